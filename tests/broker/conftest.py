"""What the broker's tests do to a broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from tests.conftest import RabbitMQ
from tests.proxy import TcpProxy


def set_memory_alarm(node: RabbitMQ, raised: bool) -> None:
    """Raise or clear the memory alarm, which blocks whoever publishes."""
    node.control("set_vm_memory_high_watermark", "0.0000001" if raised else "0.9")


def too_deep(kind: type) -> object:
    """Lists in lists, or tables in tables, which pika can send and the broker takes, but pika cannot read."""
    value: object = 1
    for _ in range(600 if kind is list else 400):
        value = [value] if kind is list else {"in": value}
    return value


@pytest.fixture
def proxied() -> Iterator[Callable[[str], tuple[str, TcpProxy]]]:
    """Puts a proxy in front of a URL's server: gives the URL through the proxy, and the proxy."""
    proxies = []

    def make(url: str) -> tuple[str, TcpProxy]:
        port = urlsplit(url).port
        assert port is not None
        proxy = TcpProxy(port)
        proxies.append(proxy)
        return url.replace(f":{port}/", f":{proxy.port}/"), proxy

    yield make
    for proxy in proxies:
        proxy.close()
