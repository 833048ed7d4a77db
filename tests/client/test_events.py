"""The event stream of a task: what is new, and when to connect again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.producer.client.errors import NotFound, Unavailable
from inferq.producer.client.events import EventStream
from inferq.schemas import Event, EventData
from tests.client.conftest import AnyClient, Connect, Pieces, Scripted
from tests.gateway.conftest import Gateway


def event(state: Any, progress: float | None = None, note: str | None = None) -> Event:
    data = EventData(task_id="a", task_type="echo", tenant="t", state=state, progress=progress, note=note)
    kind: Any = {"running": "task.progress", "queued": "task.queued"}.get(state, f"task.{state}")
    return Event(type=kind, timestamp=datetime.now(UTC), data=data)


def sse(*events: Event) -> bytes:
    return b"".join(
        f": ping\nevent: {e.type}\r\ndata: {e.model_dump_json()}\r\n\r\n".encode() for e in events
    )


async def test_events_until_the_end(client: AnyClient, lone_gateway: Gateway) -> None:
    task = lone_gateway.began("e")
    events: list[Event] = []
    async for event in client.each("events", "e"):
        events.append(event)
        if len(events) == 1:
            lone_gateway.status.progress(lone_gateway.tenant, "e", 0.5, "half\u2028way\x85")
            lone_gateway.end(task)
    assert [event.type for event in events] == ["task.started", "task.progress", "task.succeeded"]
    assert events[1].data.note == "half\u2028way\x85"


async def test_a_stream_that_is_cut_off_is_connected_again(connect: Connect) -> None:
    busy = {"Retry-After": "0"}
    cut = Pieces(sse(event("queued"), event("running", 0.2)), b"data: {half", httpx.ReadError("cut"))
    transport = Scripted(
        httpx.Response(502, headers=busy),
        httpx.Response(200, stream=cut),
        httpx.Response(503, headers=busy),
        httpx.Response(200, stream=Pieces(sse(event("running", 0.2)))),  # the gateway shut down
        httpx.Response(
            200, stream=Pieces(sse(event("running", 0.2), event("running", 0.4), event("succeeded")))
        ),
    )
    client = connect("http://x", "k", transport=transport)
    found = [(event.data.state, event.data.progress) for event in await client.events("a")]
    assert found == [("queued", None), ("running", 0.2), ("running", 0.4), ("succeeded", None)]
    assert transport.answers == []


def test_pauses_grow_until_an_event_arrives() -> None:
    stream = EventStream("a", retries=2)
    pauses = []
    for reply in (httpx.ConnectError("refused"), httpx.Response(503, headers={"Retry-After": "7"})):
        stream.connect(1)
        stream.failed(reply)
        pauses.append(stream.pause)
    assert 0 < pauses[0] <= 0.25
    assert pauses[1] == 7
    stream.connect(1)
    assert stream.feed(sse(event("running")))
    assert stream.pause == 0.5
    stream.failed(httpx.ReadError("cut"))
    stream.failed(httpx.ReadError("cut"))
    last = httpx.ReadError("cut")
    with pytest.raises(Unavailable) as caught:
        stream.failed(last)
    assert caught.value.__cause__ is last


def test_a_refusal_is_final() -> None:
    stream = EventStream("a", retries=2)
    request = httpx.Request("GET", "http://x")
    with pytest.raises(NotFound):
        stream.failed(httpx.Response(404, json={"detail": "no task"}, request=request))


@given(st.lists(st.text()), st.integers(1, 20))
def test_events_do_not_depend_on_how_the_stream_is_split(notes: list[str], size: int) -> None:
    # A surrogate cannot be sent as UTF-8.
    notes = [note.encode("utf-8", "replace").decode() for note in notes]
    events = [event("running", None, f"{n}{note}") for n, note in enumerate(notes)] + [event("failed")]
    data = sse(*events)
    stream = EventStream("a", 0)
    stream.connect(1)
    found = [e for start in range(0, len(data), size) for e in stream.feed(data[start : start + size])]
    assert found == events
    assert stream.ended
