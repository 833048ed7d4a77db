"""Redis behind TLS with a certificate of a private CA, as docs/rights.md says, and behind a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferq.producer.gateway.event_bus import EventBus
from inferq.producer.up.part import free_ports
from inferq.storage import StatusIndex, StatusOutage, StorageSettings
from tests.certificates import certificate
from tests.storage.conftest import RedisServer
from tests.waiting import eventually


@pytest.fixture
def tls_url(tmp_path: Path) -> Iterator[str]:
    """The URL of a Redis whose certificate only a private CA has signed, without that CA."""
    (port,) = free_ports(1)
    certificate(tmp_path, "localhost")
    pem = str(tmp_path / "localhost.pem")
    server = RedisServer(
        tmp_path,
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", pem, "--tls-key-file", pem, "--tls-ca-cert-file", pem),
    )
    try:
        server.start()
        yield f"rediss://localhost:{port}/0"
    finally:
        server.kill()


async def test_a_private_ca_is_named_in_the_url(tls_url: str, tmp_path: Path) -> None:
    await _serves_status_and_events(f"{tls_url}?ssl_ca_certs={tmp_path / 'localhost.pem'}")


async def test_a_unix_socket_serves_status_and_live_events(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--unixsocket", str(tmp_path / "redis.sock"))
    try:
        server.start()
        await _serves_status_and_events(f"unix://{tmp_path / 'redis.sock'}?db=3")
    finally:
        server.kill()


async def _serves_status_and_events(url: str) -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url=url))
    index.ping()
    index.close()
    bus = EventBus(url, timeout=60)
    bus.start()
    async with bus.subscribe("inferq:events:default:t"):
        await asyncio.to_thread(eventually, lambda: bus.is_subscribed("inferq:events:default:t"))
    await bus.close()


def test_without_its_ca_the_certificate_is_refused(tls_url: str) -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url=tls_url))
    with pytest.raises(
        StatusOutage, match=r"self-signed certificate; name the file of its CA .*\?ssl_ca_certs="
    ):
        index.ping()
    index.close()
