"""HTTP exchanges with untrusted servers: permitted addresses only, checked certificates, one deadline."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property

import certifi
import httpcore

from inferq.schemas.http_url import HttpUrl
from inferq.storage.fetch.addresses import (
    USUAL_PACE,
    AddressPolicy,
    GuardedBackend,
    Pace,
    Resolver,
    system_resolver,
)

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 30.0
_POOL_SECONDS = 10.0


class HttpPool:
    """Connections that are kept for the next exchange with the same server. Safe from many threads.

    Redirects are answers like any other. Errors are httpcore's exceptions, and InvalidTask (`address_refused`,
    `bad_input_url`) if a host has no permitted address. `patience`: seconds that a read or write may take.
    Connecting has a third of it, 10 s at most, so that a host's next address is tried as well. `connections` is
    the largest number of them; None for no limit.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        resolver: Resolver = system_resolver,
        ssl_context: ssl.SSLContext | None = None,
        agent: str = "inferq",
        patience: float = _READ_SECONDS,
        connections: int | None = 256,
        pace: Pace = USUAL_PACE,
    ) -> None:
        self._backend = GuardedBackend(policy, resolver, pace)
        self._ssl_context = ssl_context
        self._agent = agent
        connect = max(_CONNECT_SECONDS, patience / 3)
        self._timeouts = {"connect": connect, "read": patience, "write": patience, "pool": _POOL_SECONDS}
        self._most = connections
        self.deadline = self._backend.deadline

    @cached_property
    def _connections(self) -> httpcore.ConnectionPool:
        return httpcore.ConnectionPool(
            ssl_context=self._ssl_context or _trusted(),
            network_backend=self._backend,
            max_connections=self._most,
            max_keepalive_connections=16,
            keepalive_expiry=20.0,
        )

    def close(self) -> None:
        self._connections.close()

    @contextmanager
    def exchange(
        self, method: str, url: HttpUrl, headers: Mapping[str, str], content: bytes | None = None
    ) -> Iterator[httpcore.Response]:
        """Send a request. Read the answer's body within the block."""
        lines = {"Host": url.host_header, "User-Agent": self._agent, **headers}
        if content is not None:
            lines["Content-Length"] = str(len(content))
        encoded = [(name.encode(), value.encode()) for name, value in lines.items()]
        place = httpcore.URL(
            scheme=url.scheme.encode(), host=url.host.encode(), port=url.port, target=url.target.encode()
        )

        connected = False

        def trace(event: str, _about: object) -> None:
            nonlocal connected
            connected = connected or event == "connection.connect_tcp.started"

        def send(stack: ExitStack) -> httpcore.Response:
            extensions = {"timeout": self._timeouts, "trace": trace}
            with self._backend.head():
                return stack.enter_context(
                    self._connections.stream(
                        method, place, headers=encoded, content=content, extensions=extensions
                    )
                )

        with ExitStack() as stack:
            try:
                response = send(stack)
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError):
                # The server may just have closed a kept connection: try a new one.
                if connected:
                    raise
                response = send(stack)
            yield response


def header_of(response: httpcore.Response, name: bytes) -> str:
    """The first header of that name (lower case); empty if there is none."""
    for key, value in response.headers:
        if key.lower() == name:
            try:
                return bytes(value).decode().strip()
            except UnicodeDecodeError:
                return bytes(value).decode("latin-1").strip()
    return ""


def _trusted() -> ssl.SSLContext:
    """The system's certificates (or SSL_CERT_FILE's), and certifi's for containers without any."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
