"""Both clients against the real gateway."""

from __future__ import annotations

import inspect
import json
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferq.broker.errors import BrokerUnavailable
from inferq.broker.messages import Message
from inferq.producer.client.async_client import AsyncClient
from inferq.producer.client.errors import Conflict, InvalidRequest, NotEnded, NotFound, Unavailable
from inferq.producer.client.sync_client import Client
from tests.client.conftest import AnyClient, Connect, later
from tests.conftest import Redis
from tests.gateway.conftest import FakePublisher, Gateway, wait_until


async def test_a_task_from_its_submission_to_its_result(
    client: AnyClient, lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    status = await client.submit("echo", payload={"a": [1, "ü\u2028"]}, priority="high", metadata={"k": 1})
    assert (status.state, status.priority, status.tenant) == ("queued", "high", lone_gateway.tenant)
    assert publisher.ids() == [status.task_id]
    assert (await client.status(status.task_id)).state == "queued"
    content = {"payload": {"a": [1, "ü\u2028"]}, "priority": "high", "metadata": {"k": 1}}
    task = lone_gateway.task(status.task_id, **content)
    later(lambda: lone_gateway.end(task))
    result = await client.result(status.task_id, wait=10)
    assert result.output == {"payload": 1}
    assert (await client.wait(status.task_id, timeout=60)).state == "succeeded"


async def test_every_field_of_a_task_arrives(client: AnyClient, publisher: FakePublisher) -> None:
    expires = datetime(2100, 1, 1, tzinfo=UTC)
    await client.submit(
        "echo",
        task_id="full",
        options={},
        callback_url="https://example.com/hook",
        callback_events=["started", "completed"],
        expires_at=expires,
        time_limit=5,
        batch_id="b",
        payload=None,
        delay=1.5,
    )
    body = json.loads(publisher.messages[0].body)
    assert body["callback_events"] == ["started", "completed"]
    assert datetime.fromisoformat(body["expires_at"]) == expires
    assert (body["time_limit"], body["batch_id"], body["delay"]) == (5, "b", 1.5)


async def test_submitting_waits_for_the_end(client: AnyClient, lone_gateway: Gateway) -> None:
    task = lone_gateway.task("w", payload=1)
    later(lambda: lone_gateway.end(task), 0.3)
    assert (await client.submit("echo", task_id="w", payload=1, wait=60)).state == "succeeded"


async def test_waiting_gives_up_after_its_time(client: AnyClient, lone_gateway: Gateway) -> None:
    lone_gateway.began("slow", payload=1)
    assert (await client.submit("echo", task_id="slow", payload=1, wait=0.3)).state == "running"
    with pytest.raises(NotEnded, match="running"):
        await client.wait("slow", timeout=0.2)
    with pytest.raises(NotEnded):
        await client.result("slow", wait=0.2)
    with pytest.raises(NotEnded):
        await client.result("slow")


async def test_the_same_id_twice(client: AnyClient) -> None:
    first = await client.submit("echo", task_id="one", payload=1)
    assert await client.submit("echo", task_id="one", payload=1) == first
    with pytest.raises(Conflict) as caught:
        await client.submit("echo", task_id="one", payload=2)
    assert (caught.value.code, caught.value.status) == ("id_conflict", 409)


async def test_an_invalid_request_names_the_fields(client: AnyClient) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.submit("echo", delay=-1, nonsense=1)
    assert {fault["field"] for fault in caught.value.errors} == {"delay", "nonsense"}
    assert caught.value.status == 422
    with pytest.raises(InvalidRequest, match="nonsense"):
        await client.submit("nonsense")
    with pytest.raises(InvalidRequest):
        await client.submit("echo", payload="x" * 70_000)


async def test_an_unknown_id_is_not_found(client: AnyClient, tmp_path: Path) -> None:
    for call in (
        client.status("none"),
        client.result("none"),
        client.result("none", wait=5),
        client.wait("none", timeout=60),
        client.cancel("none"),
        client.events("none"),
        client.download("none", "a", tmp_path / "a"),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.title == "Not Found"
    assert list(tmp_path.glob("*")) == []  # noqa: ASYNC240


@pytest.mark.parametrize("task_id", [".", "..", "a:b", "A._-"])
async def test_odd_ids_reach_their_task(client: AnyClient, task_id: str) -> None:
    assert (await client.submit("echo", task_id=task_id)).task_id == task_id
    assert (await client.status(task_id)).task_id == task_id
    assert (await client.cancel(task_id)).cancel_requested


async def test_cancelling(client: AnyClient, lone_gateway: Gateway) -> None:
    await client.submit("echo", task_id="c")
    assert (await client.cancel("c")).cancel_requested
    lone_gateway.end(lone_gateway.task("c"))
    with pytest.raises(Conflict, match="succeeded"):
        await client.cancel("c")


async def test_lists_go_through_all_pages(client: AnyClient) -> None:
    ids = [(await client.submit("echo", batch_id=f"b{n % 2}")).task_id for n in range(7)]
    assert [status.task_id for status in await client.list(page_size=2)] == ids[::-1]
    assert [status.task_id for status in await client.list(batch_id="b1")] == ids[5::-2]
    assert await client.list(status="failed") == []


async def test_a_broker_outage_shorter_than_the_retries_is_no_error(
    client: AnyClient, publisher: FakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = publisher.confirm
    outage = [BrokerUnavailable("away")]
    outage[0].retry_after = 0.5

    async def after_the_outage(message: Message, *, timeout: float | None = None) -> None:
        if outage:
            raise outage.pop()
        await confirm(message, timeout=timeout)

    monkeypatch.setattr(publisher, "confirm", after_the_outage)
    status = await client.submit("echo", task_id="patient")
    assert (status.state, outage) == ("queued", [])
    assert publisher.ids() == ["patient"]


async def test_a_longer_broker_outage_is_unavailable(
    connect: Connect, lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    publisher.error = BrokerUnavailable("away")
    with pytest.raises(Unavailable, match="message broker is unavailable") as caught:
        await connect(lone_gateway.url, lone_gateway.key, retries=0).submit("echo", task_id="x")
    assert (caught.value.code, caught.value.status) == ("broker_unavailable", 503)


async def test_without_a_gateway_everything_is_unavailable(connect: Connect, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    client = connect(url, "k", retries=1)
    for call in (
        client.submit("echo"),
        client.events("a"),
        client.upload(b"x"),
        client.download("a", "b", tmp_path),
    ):
        with pytest.raises(Unavailable, match=url) as caught:
            await call
        assert caught.value.code == "unreachable"
        assert isinstance(caught.value.__cause__, httpx.TransportError)


def test_a_result_is_found_without_redis(own_gateway: Gateway, redis_node: Redis) -> None:
    """The object store alone knows of the end."""
    with Client(own_gateway.url, own_gateway.key) as client:
        task = own_gateway.began("r")
        later(lambda: own_gateway.end(task, redis=False), 0.3)
        assert client.result("r", wait=60).status == "succeeded"
        wait_until(lambda: client.status("r").ended)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, str]:
        found: dict[str, Any] = dict(inspect.getmembers(kind, inspect.isfunction))
        return {
            name: str(inspect.signature(method)).replace("Async", "")
            for name, method in found.items()
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(Client) == methods(AsyncClient)
    assert {"__init__", "submit", "events", "batch_file", "close"} <= methods(Client).keys()
    assert {"__enter__", "__exit__"} <= vars(Client).keys()
    assert {"__aenter__", "__aexit__"} <= vars(AsyncClient).keys()
