"""Decodes strangers' files in a process of their own, with limits on memory and CPU time.

A file of 2 kB may take gigabytes or hours to decode, or crash its decoder. `Decoder` starts a small server process
(`inferq.consumers.media.decoder_process`), which forks a process for each file. That process inherits nothing from
earlier files, and its end costs only a page.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np

from inferq.consumers.media.pictures import RgbImage
from inferq.schemas import InferqError, InvalidTask, TransientFailure
from inferq.schemas.memory import total_memory

PAGE_SECONDS = 60.0
"""CPU seconds that a page may take. A JPEG 2000 of 100 megapixels takes 10 to 20."""
_LEAST_MEMORY = 512 << 20
_BYTES_PER_PIXEL = 30
"""The most that a decoder needs: 16 for 32-bit colour, 4 for its RGB copy, 3 for the page, and one more copy."""
_LOOK_SECONDS = 0.1


class Decoder:
    """Opens files in other processes. One file is open at a time.

    `opener` is the `module:function` that opens a file there. It gets the path and `arguments`, and returns a
    document with `page_count`, `page(number)` and `close()`. `max_pixels` defines the memory that it may take.
    """

    def __init__(
        self,
        opener: str,
        arguments: Mapping[str, str | int],
        *,
        max_pixels: int,
        page_seconds: float = PAGE_SECONDS,
    ) -> None:
        self._opener = opener
        self._arguments = dict(arguments)
        self._page_bytes = 3 * max_pixels
        self.page_seconds = page_seconds
        # Below the limit of the engine's own memory: beyond that one, the whole engine is ended.
        self.memory = min(_LEAST_MEMORY + _BYTES_PER_PIXEL * max_pixels, total_memory() // 2)
        self._server: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._pixels = -1
        self._opened = 0

    def start(self) -> None:
        """Start the server process, unless it runs. `open` does this too; it takes half a second."""
        if self._server is not None and self._server.poll() is None:
            return
        self.close()
        near, far = socket.socketpair()
        self._pixels = _shared_file()
        # One thread each: threads reserve memory, which counts against the limit.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        with far:
            command = [sys.executable, "-P", "-m", "inferq.consumers.media.decoder_process", self._opener]
            self._server = subprocess.Popen(
                [*command, str(far.fileno()), str(self._pixels)],
                pass_fds=[far.fileno(), self._pixels],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._pipe = Connection(near.detach())

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Start the server process, which imports what it needs during the block. A block that fails ends it."""
        self.start()
        try:
            yield
        except BaseException:
            self.close()
            raise

    def open(
        self, path: Path, *, seconds: float = 3 * PAGE_SECONDS, check: Callable[[], None] = lambda: None
    ) -> DecodedFile:
        """Open a file. `seconds` of CPU time are for all its pages together.

        `check` is called while a page is decoded; if it raises, decoding ends. Raises the errors of the opener,
        InvalidTask (`decoding_limit`) and TransientFailure (`out_of_memory`).
        """
        return DecodedFile(self, path, seconds, check)

    def close(self) -> None:
        """End the server process and the process of an open file."""
        if self._server is not None:
            self._server.kill()  # a process that decodes ends with the server
            self._server.wait()
            self._server = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            os.close(self._pixels)

    @property
    def _connection(self) -> Connection:
        if self._pipe is None:
            raise TransientFailure("the decoder process is not running", code="engine_error")
        return self._pipe

    def _send(self, request: dict[str, Any]) -> None:
        self.start()
        if "open" in request:
            self._opened += 1
            request.update(
                arguments=self._arguments, memory=self.memory, page_bytes=self._page_bytes, file=self._opened
            )
        self._connection.send_bytes(json.dumps(request).encode())

    def _answer(self, check: Callable[[], None]) -> dict[str, Any]:
        """The answer for the file opened last. Raises TransientFailure if the server process ends."""
        pipe = self._connection
        try:
            while True:
                while not pipe.poll(_LOOK_SECONDS):
                    check()
                answer: dict[str, Any] = json.loads(pipe.recv_bytes())
                if answer["file"] == self._opened:
                    return answer
        except (EOFError, OSError) as error:
            self.close()
            raise TransientFailure(
                "the decoder process ended, most likely out of memory", code="out_of_memory"
            ) from error
        except BaseException:
            self.close()
            raise

    def _read_pixels(self, height: int, width: int) -> RgbImage:
        page = np.empty((height, width, 3), np.uint8)
        rest = page.data.cast("B")
        while rest:
            count = os.preadv(self._pixels, [rest], page.nbytes - len(rest))
            if not count:
                raise TransientFailure("the decoder process gave too few pixels", code="engine_error")
            rest = rest[count:]
        os.ftruncate(self._pixels, 0)
        return page


class DecodedFile:
    """A file that another process decodes. If a page ends that process, the next page gets a new one."""

    def __init__(self, decoder: Decoder, path: Path, seconds: float, check: Callable[[], None]) -> None:
        self._decoder = decoder
        self._path = path
        self._seconds = seconds
        self._check = check
        self._alive = False
        self.colour_profile: bytes | None = None
        """The ICC profile of the last page, or None."""
        self.page_count: int = self._open()["pages"]

    def page(self, number: int) -> RgbImage:
        """Page `number` (from 1), upright, `(height, width, 3) uint8` RGB.

        Raises the errors of the opener's document, InvalidTask (`decoding_limit`) for a page that takes too much
        memory or CPU time or crashes its decoder, and TransientFailure (`out_of_memory`).
        """
        what = f"page {number}"
        if not self._alive:
            self._open(what)
        answer = self._ask({"page": number}, what)
        profile = answer["profile"]
        self.colour_profile = bytes.fromhex(profile) if profile is not None else None
        return self._decoder._read_pixels(*answer["shape"])

    def close(self) -> None:
        """Close the file."""
        if self._alive:
            self._alive = False
            self._decoder._send({"close": True})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self, what: str = "the file") -> dict[str, Any]:
        return self._ask({"open": os.fspath(self._path)}, what)

    def _ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        allowed = min(self._decoder.page_seconds, self._seconds)
        if allowed < 1:
            raise InvalidTask(
                f"{what} was not decoded: the file has used up the CPU time for decoding it",
                code="decoding_limit",
            )
        self._alive = False
        self._decoder._send({**request, "seconds": allowed})
        answer = self._decoder._answer(self._check)
        self._seconds -= answer.get("seconds", allowed)
        if "signal" in answer:
            raise self._ended(answer["signal"], what, allowed)
        self._alive = answer["alive"]
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), os.fspath(self._path))
        if "error" in answer:
            kind = InvalidTask if answer["invalid"] else TransientFailure
            raise kind(answer["message"], code=answer["error"])
        return answer

    def _ended(self, number: int, what: str, allowed: float) -> InferqError:
        if number == signal.SIGKILL:
            return TransientFailure(
                "the system ended the decoder process, most likely out of memory", code="out_of_memory"
            )
        if number == signal.SIGXCPU:
            reason = f"takes more than {allowed:g} s of CPU time to decode"
        else:
            reason = (
                f"needs more than {self._decoder.memory >> 20} MiB to decode, or crashes its decoder "
                f"({_signal_name(number)})"
            )
        return InvalidTask(f"{what} {reason}: send it in a simpler form", code="decoding_limit")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _shared_file() -> int:
    """A descriptor of a file in memory, or of a temporary one where the system has no such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
