"""Connections within limits: of their number, of their number per address, and of the time that a client takes.

uvicorn waits for a request's head, and for a client to read its answer, as long as the client likes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long a client may take for a request's head, from its first byte or from the connection's start."""

STALL_SECONDS = 30.0
_SLOWEST_READER = 1024
"""How many bytes per second a client has to read of its answer, over STALL_SECONDS."""

_SWEEP_SECONDS = 1.0
_RESERVE = 32
"""Connections beyond the limit that are still accepted, for the probes."""

_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_REFUSED = "inferq.refused"
"""In the scope of a request on a connection beyond the limit."""
_OWN_DESCRIPTORS = 200


def default_limit(descriptors: int) -> int:
    """How many connections a process may have: an answer may need a file or another connection as well."""
    return min(10_000, max(16, (descriptors - _OWN_DESCRIPTORS) // 2))


class ConnectionGuard:
    """The open connections of one server, and which to close at a limit. For the event loop's thread alone.

    At a limit, the oldest connection without a request in progress makes room. If all are busy, the new one gets
    503 from `RefusedConnections`, and answers to probes. The connections of `proxies` are those of many clients: for
    them the number per address does not count.
    """

    def __init__(
        self,
        limit: int,
        per_address: int,
        *,
        head_seconds: float = HEAD_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        proxies: Sequence[IPv4Network | IPv6Network] = (),
    ) -> None:
        self.head_seconds = head_seconds
        self.stall_seconds = stall_seconds
        self._limit = limit
        self._per_address = per_address
        self._proxies = proxies
        self._open: dict[GuardedProtocol, None] = {}
        self._addresses: Counter[str] = Counter()

    def admit(self, connection: GuardedProtocol) -> None:
        """Count a new connection, and make room for it."""
        if len(self._open) >= self._limit + _RESERVE:
            connection.transport.abort()
            return
        address = connection.address
        room = True
        if self._addresses[address] >= self._per_address and not self._is_proxy(address):
            room = self._end_oldest(address)
        if len(self._open) >= self._limit:
            room = room and self._end_oldest(None)
        if not room:
            connection.app = _refused(connection.app)
        self._open[connection] = None
        self._addresses[address] += 1

    def leave(self, connection: GuardedProtocol) -> None:
        """Count a connection no more."""
        if connection in self._open:
            del self._open[connection]
            address = connection.address
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def _is_proxy(self, address: str) -> bool:
        return bool(address) and any(ip_address(address) in network for network in self._proxies)

    def _end_oldest(self, address: str | None) -> bool:
        """End the oldest idle connection (of that address); gives whether there was one."""
        for each in self._open:
            if each.idle and (address is None or each.address == address):
                self.leave(each)
                each.transport.abort()
                return True
        return False

    def sweep(self) -> None:
        """End the connections whose clients take too long."""
        now = time.monotonic()
        for each in [each for each in self._open if each.too_slow(now)]:
            each.transport.abort()

    async def watch(self) -> None:
        """Sweep every second, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.sweep()


class GuardedProtocol(H11Protocol):
    """uvicorn's connection, under a guard."""

    def __init__(self, *arguments: Any, guard: ConnectionGuard, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._guard = guard
        self._head_since: float | None = None
        self._stalled: tuple[float, int] | None = None
        self.address = ""

    @property
    def idle(self) -> bool:
        """Whether no request is in progress: none has come, or the last one is answered."""
        return self.cycle is None or self.cycle.response_complete

    def too_slow(self, now: float) -> bool:
        """Whether the client takes too long for a request's head, or to read its answer."""
        if self._head_since is not None and now - self._head_since > self._guard.head_seconds:
            return True
        unread = self.transport.get_write_buffer_size()
        if unread == 0:
            self._stalled = None
        elif self._stalled is None:
            self._stalled = now, unread
        else:
            since, before = self._stalled
            stall = self._guard.stall_seconds
            if now - since > stall:
                self._stalled = now, unread
                return unread > before - _SLOWEST_READER * stall
        return False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._head_since = time.monotonic()
        self._guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = time.monotonic()

    def resume_writing(self) -> None:
        self._stalled = None
        super().resume_writing()


def _refused(app: Any) -> ASGIApp:
    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _PROBES:
            scope[_REFUSED] = True
        await app(scope, receive, send)

    return marked


class RefusedConnections:
    """ASGI middleware: answers 503 on connections beyond the limit. No other work is done for their requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _REFUSED not in scope:
            await self._app(scope, receive, send)
            return
        scope["route"] = _Refused
        body = (
            b'{"type":"urn:inferq:problem:too_many_connections","title":"Service Unavailable","status":503,'
            b'"code":"too_many_connections","detail":"there are too many connections; try again in 5 s"}'
        )
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", b"5"),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Refused:
    """Takes the place of a route, which is not looked up: the name in the log and the metrics."""

    path = "refused"
