"""No number of slow clients keeps the gateway from answering the others, or holds it for ever."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from inferq.producer.gateway.connections import ConnectionGuard, GuardedProtocol, default_limit
from inferq.producer.gateway.server import listen, url_of
from tests.gateway.conftest import FakePublisher, Gateway, running, wait_until
from tests.logged import logged

HEAD = b"GET /v1/tasks HTTP/1.1\r\nHost: x\r\nX-Slow: "


@pytest.fixture
def small_gateway(tmp_path: Path, redis_url: str, publisher: FakePublisher) -> Iterator[Gateway]:
    with running(
        tmp_path,
        redis_url=redis_url,
        publisher=publisher,
        max_connections=20,
        max_connections_per_address=12,
    ) as gateway:
        yield gateway


@contextmanager
def connected(gateway: Gateway, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    address = urlsplit(gateway.url)
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            each = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
            with suppress(OSError):
                each.sendall(first)
            opened.append(each)
        yield opened


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("first", [b"", HEAD], ids=["silent", "in their heads"])
def test_silent_connections_make_room_for_others(small_gateway: Gateway, first: bytes) -> None:
    with connected(small_gateway, 150, first) as silent:
        for path in ("/healthz", "/v1/tasks"):
            with small_gateway.client(small_gateway.key) as client:
                assert client.get(path, timeout=2).status_code == 200
        assert ended(silent[0])


def test_busy_connections_do_not_but_probes_are_answered(small_gateway: Gateway) -> None:
    small_gateway.began("long")
    request = (
        f"GET /v1/tasks/long/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {small_gateway.key}\r\n\r\n"
    )
    with connected(small_gateway, 12, request.encode()) as streams:
        for stream in streams:
            assert stream.recv(15) == b"HTTP/1.1 200 OK"
        with small_gateway.client(small_gateway.key) as client:
            with logged("inferq.access", logging.INFO) as lines:
                refused = client.get("/v1/tasks")
                said = wait_until(lambda: [(line["message"], line["client"]) for line in lines])
            assert said == [("GET refused 503", "127.0.0.1")]
            assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
            assert refused.headers["retry-after"] == "5"
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").status_code == 200
            counted = 'inferq_http_requests_total{method="GET",route="refused",status="503"} 1.0'
            assert counted in client.get("/metrics").text
        streams[0].close()

        def accepted() -> bool:
            with small_gateway.client(small_gateway.key) as client:
                return client.get("/v1/tasks").status_code == 200

        wait_until(accepted)


async def stream_much(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(400):
        await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def test_a_slow_head_and_an_answer_that_nobody_reads_end_their_connections() -> None:
    guard = ConnectionGuard(10, 10, head_seconds=0.3, stall_seconds=0.3)
    config = uvicorn.Config(stream_much, log_config=None, lifespan="off")
    loop, state = asyncio.get_running_loop(), ServerState()
    server = await loop.create_server(lambda: GuardedProtocol(config, state, {}, guard=guard), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()

    def none_is_left() -> bool:
        guard.sweep()
        return not state.connections

    async def sweep_until_none_is_left() -> float:
        began = time.monotonic()
        await soon(none_is_left)
        return time.monotonic() - began

    async with server:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(HEAD)
        await soon(lambda: state.connections)
        dripping = asyncio.create_task(_drip(writer))
        assert await sweep_until_none_is_left() >= 0.3
        await dripping
        assert reader.at_eof() or reader.exception()
        # One that asks and then reads nothing.
        with socket.create_connection(address) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await soon(lambda: state.tasks)
            assert await sweep_until_none_is_left() >= 0.3
        await soon(lambda: not state.tasks)


async def soon(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - on the loop's own thread
            await asyncio.sleep(0.02)


async def _drip(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.02)


def test_the_limit_stays_below_the_descriptors() -> None:
    assert [default_limit(each) for each in (64, 1024, 65536)] == [16, 412, 10_000]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_two_colons_are_every_address_of_ipv4_too() -> None:
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://[::]:{port}"
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=60).close()
