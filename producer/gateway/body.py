"""Reading request bodies within limits of size and time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from anyio import from_thread
from starlette.requests import ClientDisconnect, Request
from typing_extensions import Buffer

from inferq.producer.gateway.problems import ProblemError
from inferq.schemas import InvalidTask

_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 8 * 1024 * 1024
_BUFFER_BYTES = 1 << 20


SLOWEST_BYTES = 8192
"""Bytes per second that a client has to send of a body, on average, once it has had `seconds`."""


async def body_chunks(request: Request, *, limit: int, seconds: float) -> AsyncGenerator[bytes, None]:
    """The body, chunk by chunk. Raises ProblemError

    - 413 if it has more than `limit` bytes; at once if its Content-Length says so,
    - 408 if the client sends nothing for `seconds`, or too little after that; the time that the reader of this
      generator takes does not count,
    - 415 if it is compressed.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ProblemError(
            415,
            "unsupported_encoding",
            f"Content-Encoding {encoding!r} is not supported; send the body uncompressed",
        )
    declared = request.headers.get("content-length", "")
    too_large = ProblemError(
        413,
        "too_large",
        f"the body is larger than the limit of {limit} bytes",
        headers={"Connection": "close"},
    )
    stream = request.stream()
    if declared.isdigit() and int(declared) > limit:
        if "expect" not in request.headers:
            await _drain(stream)
        raise too_large
    received = 0
    waited = 0.0
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            message = f"the client sent nothing for {seconds:g} s; send the request again"
            raise ProblemError(408, "request_timeout", message, headers={"Connection": "close"}) from error
        if chunk is None:
            return
        received += len(chunk)
        waited += time.monotonic() - began
        if received < SLOWEST_BYTES * (waited - seconds):
            message = f"the client sent less than {SLOWEST_BYTES} bytes per second; send the request again"
            raise ProblemError(408, "request_timeout", message, headers={"Connection": "close"})
        if received > limit:
            await _drain(stream)
            raise too_large
        if chunk:
            yield chunk


async def _drain(stream: AsyncIterator[bytes]) -> None:
    # Closing the connection while the client still sends would reset it, and the client might miss the answer.
    left = _DRAIN_BYTES
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    return


async def read_json(request: Request, *, limit: int, seconds: float) -> dict[str, Any]:
    """The body as a JSON object. Raises like `body_chunks`, and InvalidTask (`not_json`)."""
    async with aclosing(body_chunks(request, limit=limit, seconds=seconds)) as stream:
        return decode_json(b"".join([chunk async for chunk in stream]))


def decode_json(body: bytes, *, what: str = "the body") -> dict[str, Any]:
    """The JSON object (RFC 8259, UTF-8) in `body`, which errors call `what`. Raises InvalidTask (`not_json`)."""
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
    """An asynchronous stream, after its `first` bytes, as a file.

    For a thread that anyio started from the stream's event loop.

    `bytes` and `sha256` cover what was read so far. `read` raises what the stream raises; `error` keeps it, as
    the reader may wrap it.
    """

    def __init__(self, stream: AsyncIterator[bytes], first: bytes) -> None:
        self._stream = stream
        self._rest = memoryview(first)
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.error: Exception | None = None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def buffered(self) -> io.BufferedReader:
        """This file, buffered: `read(n)` returns fewer than `n` bytes only at the end."""
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
