"""Messages over a stream socket. Each call has a deadline, whatever the other process does.

A process that is killed while it sends leaves part of a message, and a fork of it keeps the socket open. A reader that
waits for the rest would wait for ever. This one keeps the part and goes on.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable

LARGEST_BYTES = 16 * 1024 * 1024
"""The largest message of an engine. The longest regular one is an output with a few thousand artifacts."""

_LENGTH = struct.Struct(">I")
_READ_BYTES = 256 * 1024


class Unreadable(ValueError):
    """The other process sent bytes that are no message."""


class Channel:
    """One end of a pair of sockets. One thread at a time may send, and one may receive."""

    def __init__(self, end: socket.socket, *, largest: int = LARGEST_BYTES) -> None:
        """`largest`: the bytes of the largest message that may come."""
        end.setblocking(False)
        self._socket = end
        self._largest = largest
        self._received = bytearray()
        self._ended = False
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(end, select.POLLIN)
        self._writable.register(end, select.POLLOUT)

    def poll(self, timeout: float | None = 0) -> bool:
        """Whether `receive` returns or raises at once, within `timeout` seconds (None: as long as it takes)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._fill():
            if not _wait(self._readable, deadline):
                return False
        return True

    def receive(self, timeout: float | None = None) -> bytes:
        """The next message. Raises EOFError at the end, TimeoutError, and Unreadable."""
        if not self.poll(timeout):
            raise TimeoutError(f"no whole message within {timeout} s")
        size = self._size()
        if size is None or len(self._received) < _LENGTH.size + size:
            raise EOFError
        message = bytes(memoryview(self._received)[_LENGTH.size : _LENGTH.size + size])
        del self._received[: _LENGTH.size + size]
        return message

    def send(self, message: bytes, timeout: float | None = None) -> None:
        """Send a message. Raises OSError if the other end is closed; TimeoutError if it is not read in time.

        After an error the channel is of no more use: a part of the message may have been sent.
        """
        self.send_all((message,), timeout)

    def send_all(self, messages: Iterable[bytes], timeout: float | None = None) -> None:
        """As `send`, several messages at once."""
        deadline = None if timeout is None else time.monotonic() + timeout
        left = memoryview(b"".join(part for text in messages for part in (_LENGTH.pack(len(text)), text)))
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                if not _wait(self._writable, deadline):
                    self._socket.shutdown(socket.SHUT_WR)
                    raise TimeoutError(f"the message was not read within {timeout} s") from None

    def close(self) -> None:
        self._socket.close()

    def _size(self) -> int | None:
        if len(self._received) < _LENGTH.size:
            return None
        size: int = _LENGTH.unpack_from(self._received)[0]
        if size > self._largest:
            raise Unreadable(f"it announced a message of {size} bytes; the limit is {self._largest}")
        return size

    def _fill(self) -> bool:
        """Read what has come. Gives whether that is a whole message, or nothing more will come."""
        while not self._ended:
            size = self._size()
            if size is not None and len(self._received) >= _LENGTH.size + size:
                return True
            try:
                piece = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return False
            self._received += piece
            self._ended = not piece
        return True


def _wait(poller: select.poll, deadline: float | None) -> bool:
    """Wait for an event; False once the deadline has passed."""
    if deadline is None:
        poller.poll()
        return True
    left = deadline - time.monotonic()
    return left > 0 and bool(poller.poll(left * 1000))
