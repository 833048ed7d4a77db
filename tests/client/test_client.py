"""Both clients against the real gateway: one body of tests, written for the asynchronous one."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.broker.errors import BrokerUnavailable
from inferq.producer.client.client import (
    ApiError,
    AsyncClient,
    Client,
    Conflict,
    InvalidRequest,
    NotEnded,
    NotFound,
    Unauthorized,
    Unavailable,
)
from inferq.producer.client.requests import Following, delay, task_path
from inferq.schemas import Event, EventData, InferqError, InstallationError
from inferq.storage.objects.results import upload_key
from tests.conftest import Redis
from tests.gateway.conftest import FakePublisher, Gateway, wait_until


class Both:
    """A client whose every call is awaited: the asynchronous one, or the other in its clothes."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.client, name)(*args, **kwargs)
            if hasattr(answer, "__aiter__"):
                return [item async for item in answer]
            if isinstance(answer, Awaitable):
                return await answer
            return list(answer) if hasattr(answer, "__next__") else answer

        return call


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, lone_gateway: Gateway) -> AsyncIterator[Both]:
    if request.param == "sync":
        with Client(lone_gateway.url, lone_gateway.key, retries=2) as sync:
            yield Both(sync)
    else:
        async with AsyncClient(lone_gateway.url, lone_gateway.key, retries=2) as asynchronous:
            yield Both(asynchronous)


def later(call: Callable[[], object], seconds: float = 0.2) -> None:
    threading.Timer(seconds, call).start()


async def test_a_task_from_its_submission_to_its_result(
    client: Both, lone_gateway: Gateway, publisher: FakePublisher
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
    assert (await client.wait(status.task_id, timeout=5)).state == "succeeded"


async def test_every_field_of_a_task_arrives(client: Both, publisher: FakePublisher) -> None:
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


async def test_submitting_waits_for_the_end(client: Both, lone_gateway: Gateway) -> None:
    task = lone_gateway.task("w", payload=1)
    later(lambda: lone_gateway.end(task), 0.3)
    begun = time.monotonic()
    assert (await client.submit("echo", task_id="w", payload=1, wait=20)).state == "succeeded"
    assert time.monotonic() - begun < 5


async def test_waiting_gives_up_after_its_time(client: Both, lone_gateway: Gateway) -> None:
    lone_gateway.began("slow", payload=1)
    begun = time.monotonic()
    assert (await client.submit("echo", task_id="slow", payload=1, wait=0.3)).state == "running"
    with pytest.raises(NotEnded, match="running"):
        await client.wait("slow", timeout=0.2)
    with pytest.raises(NotEnded):
        await client.result("slow", wait=0.2)
    with pytest.raises(NotEnded):
        await client.result("slow")
    assert time.monotonic() - begun < 5


async def test_the_same_id_twice(client: Both) -> None:
    first = await client.submit("echo", task_id="one", payload=1)
    assert await client.submit("echo", task_id="one", payload=1) == first
    with pytest.raises(Conflict, match="another content") as caught:
        await client.submit("echo", task_id="one", payload=2)
    assert (caught.value.code, caught.value.status) == ("id_conflict", 409)


async def test_what_is_wrong_is_told_by_field(client: Both) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.submit("echo", delay=-1, nonsense=1)
    assert {fault["field"] for fault in caught.value.errors} == {"delay", "nonsense"}
    assert caught.value.status == 422
    with pytest.raises(InvalidRequest, match="nonsense"):
        await client.submit("nonsense")
    with pytest.raises(InvalidRequest):
        await client.submit("echo", payload="x" * 70_000)


async def test_what_is_not_there_is_not_found(client: Both, tmp_path: Path) -> None:
    for call in (
        client.status("none"),
        client.result("none"),
        client.result("none", wait=5),
        client.wait("none", timeout=5),
        client.cancel("none"),
        client.events("none"),
        client.download("none", "a", tmp_path / "a"),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.title == "Not Found"
    assert list(tmp_path.glob("*")) == []  # noqa: ASYNC240


@pytest.mark.parametrize("task_id", [".", "..", "a:b", "A._-"])
async def test_odd_ids_reach_their_task(client: Both, task_id: str) -> None:
    assert (await client.submit("echo", task_id=task_id)).task_id == task_id
    assert (await client.status(task_id)).task_id == task_id
    assert (await client.cancel(task_id)).cancel_requested


async def test_cancelling(client: Both, lone_gateway: Gateway) -> None:
    await client.submit("echo", task_id="c")
    assert (await client.cancel("c")).cancel_requested
    lone_gateway.end(lone_gateway.task("c"))
    with pytest.raises(Conflict, match="succeeded"):
        await client.cancel("c")


async def test_lists_go_through_all_pages(client: Both) -> None:
    ids = [(await client.submit("echo", batch_id=f"b{n % 2}")).task_id for n in range(7)]
    assert [status.task_id for status in await client.list(page_size=2)] == ids[::-1]
    assert [status.task_id for status in await client.list(batch_id="b1")] == ids[5::-2]
    assert await client.list(status="failed") == []


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "file", "pipe"])
async def test_uploads_of_every_kind(client: Both, lone_gateway: Gateway, tmp_path: Path, kind: str) -> None:
    data = os.urandom(1 << 20)[: (1 << 20) - 7]
    path = tmp_path / "scan.jpeg"
    path.write_bytes(data)
    if kind == "pipe":
        read, write = os.pipe()

        def fill() -> None:
            with os.fdopen(write, "wb") as end:
                end.write(data)

        writer = threading.Thread(target=fill)
        writer.start()
        with os.fdopen(read, "rb") as pipe:
            url = await client.upload(pipe, filename="x.jpeg", content_type="image/jpeg")
        writer.join()
    elif kind == "file":
        with path.open("rb") as file:
            file.seek(5)
            url = await client.upload(file, filename="x.jpeg")
            assert not file.closed
        data = data[5:]
    else:
        source: Any = {"path": path, "str": str(path), "bytes": data}[kind]
        url = await client.upload(source, **({"filename": "x.jpeg"} if kind == "bytes" else {}))
    assert url.startswith("inferq:")
    assert url.endswith(".jpeg")
    assert lone_gateway.store.get(upload_key(lone_gateway.tenant, url.removeprefix("inferq:"))) == data


async def test_an_upload_over_the_limit_says_so(client: Both) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.upload(bytes((1 << 20) + 1))
    assert caught.value.status == 413


async def test_events_until_the_end(client: Both, lone_gateway: Gateway) -> None:
    task = lone_gateway.began("e")

    def work() -> None:
        lone_gateway.status.progress(lone_gateway.tenant, "e", 0.5, "half\u2028way\x85")
        lone_gateway.end(task)

    later(work, 0.3)
    events = await client.events("e")
    assert [event.type for event in events] == ["task.started", "task.progress", "task.succeeded"]
    assert events[1].data.note == "half\u2028way\x85"


async def test_downloads_appear_whole(client: Both, lone_gateway: Gateway, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    file = tmp_path / "source"
    file.write_bytes(data)
    task = lone_gateway.began("d")
    name = "ü 1.bin"
    artifact = lone_gateway.results.save_artifact(
        task.tenant, "d", name, file, "application/zip", attempt_token="t"
    )
    lone_gateway.end(task, artifacts=(artifact,))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert await client.download("d", name, folder) == folder / name
    assert (folder / name).read_bytes() == data
    target = folder / "other"
    target.write_text("old")
    assert await client.download("d", name, target) == target
    assert hashlib.sha256(target.read_bytes()).hexdigest() == artifact.sha256
    with pytest.raises(NotFound):
        await client.download("d", "nonsense", folder / "none")
    assert sorted(path.name for path in folder.iterdir()) == ["other", name]


async def test_a_broker_that_comes_back_in_time_is_no_error(client: Both, publisher: FakePublisher) -> None:
    publisher.error = BrokerUnavailable("away", retry_after=0.5)

    def back() -> None:
        publisher.error = None

    later(back, 0.3)
    status = await client.submit("echo", task_id="patient")
    assert status.state == "queued"
    assert publisher.ids() == ["patient"]


async def test_a_broker_that_stays_away_is_unavailable(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    publisher.error = BrokerUnavailable("away")
    with Client(lone_gateway.url, lone_gateway.key, retries=0) as client:
        with pytest.raises(Unavailable, match="away") as caught:
            client.submit("echo", task_id="x")
    assert (caught.value.code, caught.value.status) == ("broker_unavailable", 503)


async def test_without_a_gateway_everything_is_unavailable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with Client(url, "k", retries=1) as client:
        for call in (
            lambda: client.submit("echo"),
            lambda: list(client.events("a")),
            lambda: client.upload(b"x"),
            lambda: client.download("a", "b", tmp_path),
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert caught.value.code == "unreachable"
            assert isinstance(caught.value.__cause__, httpx.TransportError)


def test_a_wrong_key_is_unauthorized(lone_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(lone_gateway.url, "iq_nonsense") as client, pytest.raises(Unauthorized):
        client.submit("echo")
    monkeypatch.delenv("INFERQ_API_KEY", raising=False)
    monkeypatch.setenv("INFERQ_API_URL", lone_gateway.url)
    with Client() as client, pytest.raises(Unauthorized) as caught:
        client.status("a")
    assert caught.value.code == "no_api_key"
    monkeypatch.setenv("INFERQ_API_KEY", lone_gateway.key)
    with Client() as client, pytest.raises(NotFound):
        client.status("a")


Answer = httpx.Response | Exception


class Scripted(httpx.BaseTransport):
    """Answers from a list, and notes what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def status_answer(state: str = "queued") -> httpx.Response:
    return httpx.Response(200, json={"task_id": "a", "task_type": "echo", "tenant": "t", "state": state})


def test_a_lost_answer_is_asked_for_again_with_the_same_id(slept: list[float]) -> None:
    transport = Scripted(httpx.ReadError("lost"), httpx.ConnectError("refused"), status_answer())
    with Client("http://x", "k", transport=transport) as client:
        client.submit("echo", payload=1)
    ids = {(request.method, request.url.path) for request in transport.requests}
    assert len(ids) == 1
    assert len({request.content for request in transport.requests}) == 1
    assert len(slept) == 2


def test_retry_after_is_honoured(slept: list[float]) -> None:
    busy = [httpx.Response(503, headers={"Retry-After": value}) for value in ("7", "99999", "nonsense", "-1")]
    with Client("http://x", "k", transport=Scripted(*busy, status_answer())) as client:
        client.status("a")
    assert slept[:2] == [7, 30]
    assert all(0 < pause <= 2 for pause in slept[2:])


def test_a_proxy_whose_gateway_is_away_is_asked_again(slept: list[float]) -> None:
    busy = [httpx.Response(status, text="<html>") for status in (502, 504, 429)]
    with Client("http://x", "k", transport=Scripted(*busy, status_answer())) as client:
        assert client.status("a").state == "queued"
    streams = [httpx.Response(502), httpx.Response(504), streamed(event("succeeded"))]
    with Client("http://x", "k", transport=Scripted(*streams)) as client:
        assert [found.data.state for found in client.events("a")] == ["succeeded"]


def test_no_single_wait_is_as_long_as_proxies_wait(slept: list[float]) -> None:
    transport = Scripted(status_answer(), status_answer("failed"), status_answer("failed"))
    with Client("http://x", "k", transport=transport) as client:
        client.submit("echo", task_id="a", wait=600)
        client.wait("a")
    waits = [int(request.headers["prefer"].removeprefix("wait=")) for request in transport.requests]
    assert len(waits) == 3
    assert all(10 <= wait <= 30 for wait in waits)


@pytest.mark.parametrize("fault", [404, 503, httpx.ConnectError("refused")], ids=["404", "503", "refused"])
def test_an_accepted_task_is_no_error_whatever_its_wait_meets(
    fault: int | Exception, slept: list[float]
) -> None:
    faults = [httpx.Response(fault) if isinstance(fault, int) else fault for _ in range(5)]
    transport = Scripted(status_answer(), *faults)
    with Client("http://x", "k", transport=transport) as client:
        status = client.submit("echo", task_id="a", wait=60)
    assert (status.task_id, status.state) == ("a", "queued")
    assert [request.method for request in transport.requests[:2]] == ["PUT", "GET"]


async def test_many_wait_at_once() -> None:
    """Each holds a connection, and none may keep the others from theirs."""
    together, count = asyncio.Event(), 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        await reader.readuntil(b"\r\n\r\n")
        count += 1
        if count == 150:
            together.set()
        await together.wait()
        body = status_answer("succeeded").content
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, backlog=200) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncClient(url, "k", timeout=5, retries=0) as client:
            found = await asyncio.gather(*(client.wait("a", timeout=20) for _ in range(150)))
    assert {status.state for status in found} == {"succeeded"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.9.1", "::1"])
async def test_no_proxy_comes_between_this_machine_and_itself(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        gateway = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    gateway.settimeout(10)

    def answer() -> None:
        for _ in range(2):
            with gateway.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with gateway:
        threading.Thread(target=answer, daemon=True).start()
        url = str(httpx.URL("http://x").copy_with(host=host, port=gateway.getsockname()[1]))
        with Client(url, "k", retries=0) as client, pytest.raises(NotFound):
            client.status("a")
        async with AsyncClient(url, "k", retries=0) as asynchronous:
            with pytest.raises(NotFound):
                await asynchronous.status("a")


def test_a_proxy_stays_for_a_gateway_elsewhere(
    lone_gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = lone_gateway.url  # answers any request that is sent to it, whatever host it names
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    with Client("http://gateway.invalid", lone_gateway.key, retries=0) as client:
        with pytest.raises(ApiError) as caught:
            client.status("none")
    assert caught.value.code != "unreachable"


@pytest.mark.parametrize("url", ["http://[::1", "http://x:port", "localhost:8000", "http://", "ftp://x"])
def test_an_address_that_cannot_be_one_names_its_setting(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_API_URL", url)
    for kind in (Client, AsyncClient):
        with pytest.raises(InstallationError, match="INFERQ_API_URL"):
            kind()


@pytest.mark.parametrize("key", ["k\udcfc", "kü", "k\n", "k k", "\u2028"])
def test_a_key_that_cannot_be_one_names_its_setting(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_API_KEY", key)
    for kind in (Client, AsyncClient):
        with pytest.raises(InstallationError, match="INFERQ_API_KEY") as refused:
            kind()
        assert key not in refused.value.message


def test_what_cannot_be_read_again_is_sent_once(slept: list[float]) -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    os.close(write)
    transport = Scripted(httpx.ConnectError("refused"))
    with os.fdopen(read, "rb") as pipe, Client("http://x", "k", transport=transport) as client:
        with pytest.raises(Unavailable):
            client.upload(pipe)
    assert slept == []


def test_an_upload_is_sent_whole_again(slept: list[float]) -> None:
    transport = Scripted(httpx.Response(503), httpx.Response(201, json={"url": "inferq:a"}))
    with Client("http://x/base", "k", transport=transport) as client:
        assert client.upload(b"abc", filename="a.txt") == "inferq:a"
    assert [request.content for request in transport.requests] == [b"abc", b"abc"]
    request = transport.requests[0]
    assert str(request.url) == "http://x/base/v1/files?filename=a.txt"
    assert request.headers["content-length"] == "3"
    assert "transfer-encoding" not in request.headers


@pytest.mark.parametrize("status", [200, 404, 500, 502, 302])
def test_answers_that_are_not_the_gateways_are_errors(status: int, slept: list[float]) -> None:
    answers = [httpx.Response(status, text="<html>") for _ in range(5)]
    with Client("http://x", "k", transport=Scripted(*answers)) as client:
        with pytest.raises(ApiError) as caught:
            client.status("a")
    assert caught.value.status == status
    assert isinstance(caught.value, InferqError)


def test_a_gateway_that_lets_nobody_wait_is_not_hammered(slept: list[float]) -> None:
    answers = [status_answer() for _ in range(5)]
    with Client("http://x", "k", transport=Scripted(*answers, status_answer("failed"))) as client:
        assert client.wait("a").state == "failed"
    assert slept == [0.5] * 5


def sse(*events: Event) -> bytes:
    return b"".join(
        f": ping\nevent: {e.type}\r\ndata: {e.model_dump_json()}\r\n\r\n".encode() for e in events
    )


def streamed(*events: Event) -> httpx.Response:
    return httpx.Response(200, content=iter([sse(*events)]))


def event(state: Any, progress: float | None = None, note: str | None = None) -> Event:
    data = EventData(task_id="a", task_type="echo", tenant="t", state=state, progress=progress, note=note)
    kind: Any = {"running": "task.progress", "queued": "task.queued"}.get(state, f"task.{state}")
    return Event(type=kind, timestamp=datetime.now(UTC), data=data)


def test_a_stream_that_is_cut_off_goes_on(slept: list[float]) -> None:
    def broken(data: bytes) -> Iterator[bytes]:
        yield data
        raise httpx.ReadError("cut")

    transport = Scripted(
        httpx.Response(200, content=broken(sse(event("queued"), event("running", 0.2)) + b"data: {half")),
        httpx.Response(503),
        httpx.ConnectError("refused"),
        streamed(event("running", 0.2)),  # the gateway stopped in good order
        streamed(event("running", 0.2), event("running", 0.4), event("succeeded")),
    )
    with Client("http://x", "k", transport=transport) as client:
        states = [(found.data.state, found.data.progress) for found in client.events("a")]
    assert states == [("queued", None), ("running", 0.2), ("running", 0.4), ("succeeded", None)]
    assert transport.answers == []
    assert len(slept) == 4


@given(st.lists(st.text()), st.integers(1, 20))
def test_events_are_read_the_same_however_the_stream_is_cut(notes: list[str], size: int) -> None:
    # Surrogates are no text that could travel.
    notes = [note.encode("utf-8", "replace").decode() for note in notes]
    events = [event("running", None, f"{n}{note}") for n, note in enumerate(notes)] + [event("failed")]
    data = sse(*events)
    following = Following("a", 0)
    following.arguments(1)
    found = [e for start in range(0, len(data), size) for e in following.news(data[start : start + size])]
    assert found == events
    assert following.ended


def test_a_damaged_download_is_fetched_again(tmp_path: Path, slept: list[float]) -> None:
    etag = {"ETag": f'"{hashlib.sha256(b"right").hexdigest()}"'}
    transport = Scripted(
        httpx.Response(200, content=b"wrong", headers=etag),
        httpx.Response(200, content=b"right", headers=etag),
    )
    with Client("http://x", "k", transport=transport) as client:
        client.download("a", "f", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"right"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_download_has_the_usual_rights(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with Client("http://x", "k", transport=Scripted(httpx.Response(200, content=b"x"))) as client:
        client.download("a", "f", tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


@given(st.integers(0, 5000), st.sampled_from([None, "1", "1e9", "nan", "inf", "x"]))
def test_a_pause_is_never_long_nor_negative(tried: int, said: str | None) -> None:
    headers = {"Retry-After": said} if said else {}
    assert 0 <= delay(httpx.Response(503, headers=headers), tried) <= 30


@given(st.text(min_size=1))
def test_no_id_leaves_its_place_in_the_path(task_id: str) -> None:
    task_id = task_id.encode("utf-8", "replace").decode()
    url = httpx.URL("http://x").join(task_path(task_id))
    assert url.raw_path.startswith(b"/v1/tasks/")
    assert url.raw_path.count(b"/") == 3
    assert b"?" not in url.raw_path


async def test_a_file_whose_name_is_not_utf8_is_uploaded(client: Both, tmp_path: Path) -> None:
    page = tmp_path / os.fsdecode(b"b\xff.png")
    page.write_bytes(b"a")
    assert (await client.upload(page)).endswith(".png")


async def test_a_failing_source_is_the_callers_error(client: Both) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError("bad disk")

    with pytest.raises(OSError, match="bad disk"):
        await client.upload(io.BufferedReader(Broken()))


def test_waiting_goes_on_while_redis_is_away(own_gateway: Gateway, redis_node: Redis) -> None:
    """Only the object store knows of the end."""
    with Client(own_gateway.url, own_gateway.key) as client:
        task = own_gateway.began("r")
        later(lambda: own_gateway.end(task, redis=False), 0.3)
        begun = time.monotonic()
        assert client.result("r", wait=20).status == "succeeded"
        assert time.monotonic() - begun < 10
        wait_until(lambda: client.status("r").ended)
