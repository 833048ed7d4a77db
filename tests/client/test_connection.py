"""How the clients find the gateway: address, key, connections and proxies."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpx
import pytest

from inferq.producer.client.async_client import AsyncClient
from inferq.producer.client.errors import ApiError, NotFound, Unauthorized
from inferq.producer.client.sync_client import Client
from inferq.schemas import InstallationError, TaskStatus
from tests.client.conftest import Connect
from tests.gateway.conftest import Gateway


async def test_many_wait_at_once() -> None:
    """Each wait holds a connection, and there is no maximum."""
    together, count = asyncio.Event(), 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        await reader.readuntil(b"\r\n\r\n")
        count += 1
        if count == 150:
            together.set()
        await together.wait()
        body = (
            TaskStatus(task_id="a", task_type="echo", tenant="t", state="succeeded")
            .model_dump_json()
            .encode()
        )
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, backlog=200) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncClient(url, "k", timeout=60, retries=0) as client:
            found = await asyncio.gather(*(client.wait("a", timeout=20) for _ in range(150)))
    assert {status.state for status in found} == {"succeeded"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.9.1", "::1"])
async def test_no_proxy_is_used_for_a_gateway_on_this_machine(
    connect: Connect, host: str, monkeypatch: pytest.MonkeyPatch
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
        with gateway.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with gateway:
        threading.Thread(target=answer, daemon=True).start()
        url = str(httpx.URL("http://x").copy_with(host=host, port=gateway.getsockname()[1]))
        with pytest.raises(NotFound):
            await connect(url, "k", retries=0).status("a")


def test_a_proxy_is_used_for_a_gateway_elsewhere(
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
async def test_the_message_about_a_wrong_address_names_the_setting(
    connect: Connect, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_API_URL", url)
    with pytest.raises(InstallationError, match="INFERQ_API_URL") as caught:
        connect()
    assert url not in caught.value.message.removesuffix("give http://host:port or https://host")


@pytest.mark.parametrize("key", ["k\udcfc", "kü", "k\nk", "k k", "k\u2028k"])
async def test_the_message_about_a_wrong_key_names_the_setting(
    connect: Connect, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_API_KEY", key)
    with pytest.raises(InstallationError, match="INFERQ_API_KEY") as caught:
        connect()
    assert key not in caught.value.message


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
