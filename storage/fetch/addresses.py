"""Which network addresses an untrusted URL may lead to, enforced when the connection is made.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address, not to the
name. So a DNS answer that changes between check and connection changes nothing.
"""

from __future__ import annotations

import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from ssl import SSLContext
from typing import Any, overload

import httpcore

from inferq.schemas import InvalidTask
from inferq.storage.settings import Network

_log = logging.getLogger(__name__)

SLOWEST_BYTES = 1024
"""Bytes per second that a server has to send of an input, on average, once it has had `Pace.patience`."""

_MOST_HEAD_BYTES = 256 * 1024

Resolver = Callable[[str, int], Sequence[str]]
"""Host name and port → IP addresses. Raises OSError or UnicodeError if the name has none."""

_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""The answers that last; others, such as EAI_AGAIN, may pass."""

# IANA's special-purpose registries (RFC 6890), spelled out: Python's own list changes between releases.
_SPECIAL_V4 = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # a public address, but inside Azure its platform service
    )
)  # fmt: skip
_GLOBAL_V6 = ip_network("2000::/3")
_SPECIAL_V6 = tuple(
    ip_network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052


@dataclass(frozen=True)
class Pace:
    """How an exchange with a checkpoint waits for its server, in seconds.

    `patience`: before it ends if the server sends too little. `look`: from one call of the checkpoint to the next.
    """

    patience: float = 30.0
    look: float = 0.5


USUAL_PACE = Pace()


class AddressRefused(InvalidTask):
    """The URL leads to no address, or to a private, loopback, link-local or otherwise special one."""

    code = "address_refused"


class AddressPolicy:
    """Permits public addresses and the allowed networks, which an operator lists in `setting`."""

    def __init__(
        self, allowed: Iterable[Network] = (), *, setting: str = "INFERQ_FETCH_ALLOWED_NETWORKS"
    ) -> None:
        self._allowed = tuple(allowed)
        self._setting = setting

    def permits(self, address: str) -> bool:
        """Whether connections to this IP address are permitted; an IPv6 zone (`%eth0`) is ignored."""
        try:
            ip = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        if any(ip in network for network in self._allowed if network.version == ip.version):
            return True
        if isinstance(ip, IPv4Address):
            return not any(ip in network for network in _SPECIAL_V4)
        if ip in _NAT64:
            return self.permits(str(IPv4Address(int(ip) & 0xFFFFFFFF)))
        return ip in _GLOBAL_V6 and not any(ip in network for network in _SPECIAL_V6)

    def check(self, host: str, addresses: Sequence[str]) -> list[str]:
        """The permitted addresses of the host. Raises AddressRefused if there is none.

        A name that does not exist is refused in the same words: the sender of a task must not learn which internal
        names exist, nor their addresses. The log tells them apart.
        """
        permitted = [address for address in addresses if self.permits(address)]
        if not permitted:
            _log.warning("host %r leads to %s: refused", host, ", ".join(addresses[:4]) or "no address")
            raise AddressRefused(
                f"host {host!r} leads to no public address; an operator can allow its network "
                f"({self._setting})"
            )
        return permitted


def system_resolver(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver returns, in its order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore.NetworkBackend):
    """Connects an httpcore pool to permitted addresses only, and ends each exchange at its deadline.

    `deadline` sets it for the calling thread. It bounds resolving, connecting, TLS, and all reads and writes
    together, so a server that sends a byte at a time cannot prolong it.
    """

    def __init__(
        self, policy: AddressPolicy, resolver: Resolver = system_resolver, pace: Pace = USUAL_PACE
    ) -> None:
        self._policy = policy
        self._resolver = resolver
        self._backend = httpcore.SyncBackend()
        self._clock = _Clock(pace)

    @contextmanager
    def deadline(self, seconds: float, checkpoint: Callable[[], None] | None = None) -> Iterator[None]:
        """Bound everything that the calling thread does within the block, to so many seconds.

        `checkpoint` is called before each read and while a read waits; it may raise to give up. With
        it, a server that sends less than SLOWEST_BYTES per second ends the exchange as well (httpcore.ReadTimeout).
        """
        clock = self._clock
        clock.began, clock.received = time.monotonic(), 0
        clock.ends, clock.checkpoint = clock.began + seconds, checkpoint
        try:
            yield
        finally:
            clock.ends = clock.checkpoint = None

    @contextmanager
    def head(self) -> Iterator[None]:
        """Bound what the calling thread reads within the block: an answer may begin with endless 1xx answers."""
        self._clock.head_left = _MOST_HEAD_BYTES
        try:
            yield
        finally:
            self._clock.head_left = None

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._policy.check(host, self._resolve(host, port))
        failure: Exception | None = None
        for address in addresses[:4]:
            try:
                stream = self._backend.connect_tcp(
                    address,
                    port,
                    timeout=self._clock.left(timeout, httpcore.ConnectTimeout),
                    local_address=local_address,
                    socket_options=socket_options,
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _TimedStream(stream, self._clock)
        raise failure or httpcore.ConnectError(f"host {host!r} has no address")

    def _resolve(self, host: str, port: int) -> Sequence[str]:
        """The resolver's answer. It has no time limit of its own, so another thread waits for it."""
        answers: queue.SimpleQueue[Sequence[str] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._resolver(host, port))
            except (OSError, UnicodeError) as error:
                answers.put(error)

        left = self._clock.left(None, httpcore.ConnectTimeout)
        threading.Thread(target=ask, name="resolve", daemon=True).start()
        ends = math.inf if left is None else time.monotonic() + left
        while True:
            if self._clock.checkpoint is not None:
                self._clock.checkpoint()
            try:
                answer = answers.get(timeout=max(0.0, min(self._clock.pace.look, ends - time.monotonic())))
                break
            except queue.Empty as error:
                if time.monotonic() >= ends:
                    raise httpcore.ConnectTimeout(f"resolving {host!r} took too long") from error
        if isinstance(answer, UnicodeError):
            raise InvalidTask(f"{host!r} is not a host name", code="bad_input_url") from answer
        if isinstance(answer, socket.gaierror) and answer.errno in _NO_SUCH_NAME:
            return []
        if isinstance(answer, OSError):
            raise httpcore.ConnectError(f"host {host!r} cannot be resolved: {answer}") from answer
        return answer


class _Clock(threading.local):
    """The calling thread's deadline (monotonic seconds)."""

    ends: float | None = None
    began = 0.0
    received = 0
    checkpoint: Callable[[], None] | None = None
    head_left: int | None = None

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def count(self, size: int) -> None:
        """Count bytes of the server. Raises an httpcore error if they are too many for a head, or too few."""
        self.received += size
        if self.head_left is not None:
            self.head_left -= size
            if self.head_left < 0:
                raise httpcore.RemoteProtocolError(f"its head has more than {_MOST_HEAD_BYTES} bytes")
        if self.checkpoint is not None:
            late = time.monotonic() - self.began - self.pace.patience
            if late > 0 and self.received < SLOWEST_BYTES * late:
                raise httpcore.ReadTimeout(f"the server sends less than {SLOWEST_BYTES} bytes per second")

    @overload
    def left(self, timeout: float, expired: type[Exception]) -> float: ...

    @overload
    def left(self, timeout: float | None, expired: type[Exception]) -> float | None: ...

    def left(self, timeout: float | None, expired: type[Exception]) -> float | None:
        """The shorter of a timeout and the time left. Raises `expired` if none is left."""
        if self.ends is None:
            return timeout
        left = self.ends - time.monotonic()
        if left <= 0:
            raise expired("the time limit of the whole exchange is over")
        return left if timeout is None else min(left, timeout)


class _TimedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, clock: _Clock) -> None:
        self._stream = stream
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        clock = self._clock
        ends = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = clock.left(max(0.0, ends - time.monotonic()), httpcore.ReadTimeout)
            if clock.checkpoint is not None:
                clock.checkpoint()
                left = min(left, clock.pace.look)
            try:
                piece = self._stream.read(max_bytes, None if left == math.inf else left)
            except httpcore.ReadTimeout:
                if clock.checkpoint is None or time.monotonic() >= ends:
                    raise
                clock.count(0)
            else:
                clock.count(len(piece))
                return piece

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = self._clock.left(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
