from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from inferq.producer.gateway.event_bus import EventBus
from inferq.producer.gateway.events import EventFilter
from inferq.schemas import END_STATES, ErrorInfo, State, Task
from tests.conftest import Redis
from tests.gateway.conftest import FakePublisher, Gateway, running, wait_until
from tests.gateway.test_gateway_submit import ECHO


class Stream:
    """An open event stream."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.comments = 0

    def _lines(self) -> Iterator[str]:
        rest = b""
        for chunk in self._response.iter_raw():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode() for line in lines)

    def events(self) -> Iterator[dict[str, Any]]:
        name = None
        for line in self._lines():
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert event["type"] == name
                yield event


def types(gateway: Gateway, task_id: str) -> list[str]:
    with gateway.http.stream("GET", f"/v1/tasks/{task_id}/events") as response:
        assert response.status_code == 200
        return [event["type"] for event in Stream(response).events()]


def test_a_stream_starts_with_the_status_and_follows_every_step(gateway: Gateway) -> None:
    gateway.http.put("/v1/tasks/e", json=ECHO)
    with gateway.http.stream("GET", "/v1/tasks/e/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = Stream(response).events()
        first = next(events)
        assert (first["type"], first["data"]["state"]) == ("task.queued", "queued")
        task = gateway.began("e", payload="hello")
        assert next(events)["type"] == "task.started"
        gateway.status.progress(gateway.tenant, "e", 0.5, "half way\u2028there")
        progress = next(events)
        assert (progress["type"], progress["data"]["progress"]) == ("task.progress", 0.5)
        error = ErrorInfo(code="oom", message="no memory", retryable=True)
        gateway.status.retrying(task, attempt=1, redrives=0, error=error)
        assert next(events)["data"]["error"]["code"] == "oom"
        gateway.end(task)
        last = next(events)
        assert (last["type"], last["data"]["output"]) == ("task.succeeded", {"payload": 1})
        assert next(events, None) is None


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_the_stream_of_an_ended_task_is_one_event(gateway: Gateway, state: Any) -> None:
    gateway.end(gateway.began("e", metadata={"k": 1}), state)
    with gateway.http.stream("GET", "/v1/tasks/e/events") as response:
        (event,) = Stream(response).events()
    assert event["type"] == f"task.{state}"
    assert event["data"]["metadata"] == {"k": 1}


def test_a_large_output_does_not_travel_in_events(gateway: Gateway) -> None:
    gateway.end(gateway.began("e"), output={"text": "x" * 100_000})
    with gateway.http.stream("GET", "/v1/tasks/e/events") as response:
        (event,) = Stream(response).events()
    assert event["data"]["output"] is None


def test_heartbeats_keep_a_quiet_stream_alive(gateway: Gateway) -> None:
    task = gateway.began("e")
    with gateway.http.stream("GET", "/v1/tasks/e/events") as response:
        stream = Stream(response)
        events = stream.events()
        next(events)
        threading.Timer(1.5, lambda: gateway.end(task)).start()
        assert next(events)["type"] == "task.succeeded"
    assert stream.comments >= 1


def test_no_end_is_missed_however_close_to_the_start_of_a_stream(gateway: Gateway) -> None:
    tasks = [gateway.began(f"race-{n}") for n in range(40)]

    def follow(task_id: str) -> list[str]:
        return types(gateway, task_id)

    with ThreadPoolExecutor(16) as threads:
        streams = [threads.submit(follow, task.task_id) for task in tasks]
        for task in tasks:
            gateway.end(task)
        for stream in streams:
            assert stream.result(20)[-1] == "task.succeeded"


def test_several_readers_of_one_task_all_see_its_end(gateway: Gateway) -> None:
    task = gateway.began("shared")
    metric = "inferq_event_streams "
    with ThreadPoolExecutor(5) as threads:
        streams = [threads.submit(types, gateway, "shared") for _ in range(5)]
        wait_until(lambda: f"{metric}5.0" in gateway.http.get("/metrics").text)
        gateway.end(task)
        assert [stream.result(60)[-1] for stream in streams] == ["task.succeeded"] * 5
    wait_until(lambda: f"{metric}0.0" in gateway.http.get("/metrics").text)


def test_a_reader_that_leaves_is_forgotten(gateway: Gateway) -> None:
    gateway.began("e")
    event_bus = gateway.server.config.app.state.services.event_bus  # type: ignore[union-attr]
    with gateway.client(gateway.key) as client:
        with client.stream("GET", "/v1/tasks/e/events") as response:
            events = Stream(response).events()  # held, since the stream is closed when it is let go
            next(events)
            assert event_bus._subscriptions
    wait_until(lambda: not event_bus._subscriptions)
    assert not event_bus._acked


def test_a_channel_without_readers_is_unsubscribed(gateway: Gateway, redis_url: str) -> None:
    for n in range(5):
        gateway.began(f"e{n}")
    with ThreadPoolExecutor(5) as threads:
        waits = [
            threads.submit(gateway.http.get, f"/v1/tasks/e{n}", headers={"Prefer": "wait=1"})
            for n in range(5)
        ]
        with redis.Redis.from_url(redis_url) as client:
            pattern = f"inferq:events:{gateway.tenant}:*"
            wait_until(lambda: len(client.pubsub_channels(pattern)) == 5)
            assert {wait.result(60).json()["state"] for wait in waits} == {"running"}
            wait_until(lambda: client.pubsub_channels(pattern) == [])


@contextmanager
def streaming(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher, **settings: Any
) -> Iterator[tuple[Gateway, Task, Iterator[dict[str, Any]]]]:
    """A gateway, a running task, and the task's events after `task.started`."""
    with running(tmp_path, redis_url=redis_node.url, publisher=publisher, **settings) as gateway:
        task = gateway.began("e")
        with gateway.http.stream("GET", "/v1/tasks/e/events") as response:
            events = Stream(response).events()
            assert next(events)["type"] == "task.started"
            yield gateway, task, events


def test_an_end_while_redis_is_unavailable_still_ends_the_stream(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher
) -> None:
    with streaming(tmp_path, redis_node, publisher) as (gateway, task, events):
        redis_node.kill()
        gateway.end(task, redis=False)
        assert next(events)["type"] == "task.succeeded"
        assert next(events, None) is None


def test_a_stream_goes_on_when_redis_is_back(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher
) -> None:
    with streaming(tmp_path, redis_node, publisher, events_heartbeat=60) as (gateway, task, events):
        redis_node.kill()
        redis_node.start()
        event_bus = gateway.server.config.app.state.services.event_bus  # type: ignore[union-attr]
        wait_until(lambda: any(acked.is_set() for acked in event_bus._acked.values()))
        gateway.began("e")
        gateway.status.progress(gateway.tenant, "e", 0.7, None)
        gateway.end(task)
        # The heartbeat is longer than the client's own time limit: polling alone would come too late.
        assert [event["type"] for event in events][-1] == "task.succeeded"


def test_a_stream_outlasts_a_redis_that_came_back_empty(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher
) -> None:
    with streaming(tmp_path, redis_node, publisher, events_heartbeat=0.3) as (gateway, task, events):
        with redis.Redis.from_url(redis_node.url) as client:
            client.flushdb()
        timer = threading.Timer(1.0, gateway.end, (task,), {"redis": False})
        timer.start()
        assert [event["type"] for event in events][-1] == "task.succeeded"
        timer.join()


def test_streams_end_when_the_gateway_stops(tmp_path: Path, redis_url: str, publisher: FakePublisher) -> None:
    with running(tmp_path, redis_url=redis_url, publisher=publisher, shutdown_grace=30) as gateway:
        gateway.began("e")
        with gateway.http.stream("GET", "/v1/tasks/e/events") as response:
            events = Stream(response).events()
            next(events)
            gateway.server.should_exit = True
            # Past the grace period the stream would be cut off, which the client takes for an error.
            assert next(events, None) is None


_STATES: list[State] = ["queued", "running", "retrying", "succeeded", "failed", "cancelled"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(_STATES),
            st.integers(1, 4),
            st.none() | st.floats(0, 1),
            st.booleans(),
        )
    )
)
def test_a_reader_never_receives_an_older_state(told: list[tuple[State, int, float | None, bool]]) -> None:
    received = EventFilter()
    passed = [
        (state, attempt)
        for state, attempt, progress, polled in told
        if received.is_news(state, attempt, progress, polled=polled)
    ]
    order = {"queued": 0, "running": 1, "retrying": 2}
    marks = [(9, 9) if state in END_STATES else (attempt, order[state]) for state, attempt in passed]
    assert marks == sorted(marks)
    if told:
        assert passed[0] == told[0][:2]


def test_events_overtaken_by_a_poll_are_dropped() -> None:
    received = EventFilter()
    assert received.is_news("running", 1, 0.5, polled=True)
    assert not received.is_news("queued", 1, None, polled=False)
    assert not received.is_news("running", 1, None, polled=False)
    assert not received.is_news("running", 1, 0.4, polled=False)
    assert received.is_news("running", 1, 0.6, polled=False)
    assert received.is_news("retrying", 1, None, polled=False)
    assert received.is_news("running", 2, None, polled=False)
    assert received.is_news("failed", 2, None, polled=False)
    assert not received.is_news("running", 2, None, polled=False)


async def test_whatever_stops_live_events_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("inferq.producer.gateway.event_bus._RECONNECT_SECONDS", 0.001)
    event_bus = EventBus("redis://127.0.0.1:1", timeout=1)
    attempts: list[str] = []

    async def fail() -> None:
        attempts.append("listen")
        raise TypeError("no such option")

    monkeypatch.setattr(event_bus, "_listen", fail)
    event_bus.start()
    async with event_bus.subscribe("channel"):
        await asyncio.to_thread(wait_until, lambda: len(attempts) > 3)
    await event_bus.close()
    (record,) = (record for record in caplog.records if record.levelname != "DEBUG")
    assert "no such option" in record.getMessage()
    assert record.exc_info is not None
