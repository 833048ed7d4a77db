"""Request bodies, read under hard limits however the client sends them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from anyio import from_thread
from starlette.requests import ClientDisconnect, Request
from typing_extensions import Buffer

from inferq.producer.gateway.problems import Refused
from inferq.schemas import InvalidTask

_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 8 * 1024 * 1024
_BUFFER_BYTES = 1 << 20


async def pieces(request: Request, *, limit: int, seconds: float) -> AsyncGenerator[bytes, None]:
    """The body, piece by piece. Raises Refused

    - 413 once it has more than `limit` bytes, or at once where its length is declared,
    - 408 where the client sends nothing for `seconds`,
    - 415 where it is compressed.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refused(
            415, "unsupported_encoding", f"Content-Encoding {encoding!r} is not taken: send it plain"
        )
    declared = request.headers.get("content-length", "")
    too_large = Refused(
        413,
        "too_large",
        f"the body has more than {limit} bytes, which is the limit",
        headers={"Connection": "close"},
    )
    stream = request.stream()
    if declared.isdigit() and int(declared) > limit:
        if "expect" not in request.headers:
            await _drain(stream)
        raise too_large
    taken = 0
    while True:
        try:
            async with asyncio.timeout(seconds):
                piece = await anext(stream, None)
        except TimeoutError as error:
            message = f"nothing came for {seconds:g} s"
            raise Refused(408, "request_timeout", message, headers={"Connection": "close"}) from error
        if piece is None:
            return
        taken += len(piece)
        if taken > limit:
            await _drain(stream)
            raise too_large
        if piece:
            yield piece


async def _drain(stream: AsyncIterator[bytes]) -> None:
    # A client that is still sending when we close the connection gets a reset and may never see the answer.
    left = _DRAIN_BYTES
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for piece in stream:
                left -= len(piece)
                if left < 0:
                    return


async def read_object(request: Request, *, limit: int, seconds: float) -> dict[str, Any]:
    """The body as a JSON object. Raises what `pieces` does, and InvalidTask (`not_json`)."""
    async with aclosing(pieces(request, limit=limit, seconds=seconds)) as stream:
        return decode_object(b"".join([piece async for piece in stream]))


def decode_object(body: bytes, *, what: str = "the body") -> dict[str, Any]:
    """The JSON object (RFC 8259, UTF-8) in `what`. Raises InvalidTask (`not_json`)."""
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"{what} is not JSON: {error}", code="not_json") from error
    if not isinstance(document, dict):
        raise InvalidTask(f"{what} is not a JSON object", code="not_json")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class BodyFile(io.RawIOBase):
    """An asynchronous stream of pieces as a file, for a thread that anyio runs for the stream's event loop.

    `bytes` and `sha256` tell of what was read so far. What the stream raises, `read` raises, and `error`
    keeps, in case the reader wraps it.
    """

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._rest = memoryview(b"")
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.error: Exception | None = None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def buffered(self) -> io.BufferedReader:
        """This file, whose `read(n)` gives less than `n` bytes only at the end."""
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        if not self._rest:
            self._rest = memoryview(from_thread.run(self._next))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._hash.update(self._rest[:size])
        self._rest = self._rest[size:]
        self.bytes += size
        return size

    async def _next(self) -> bytes:
        try:
            return await anext(self._stream, b"")
        except Exception as error:
            self.error = error
            raise
