"""The server process of `Decoder`: forks a process for each file.

`python -P -m inferq.consumers.media.decoder_process MODULE:FUNCTION PIPE PIXELS`. Requests and answers are JSON
over the pipe, pixels a file that both processes have open. The server has one thread and no model, so that forking
it is safe and quick.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import AvifImagePlugin, Image

from inferq.consumers.machine import die_with
from inferq.consumers.media.pictures import RgbImage
from inferq.schemas import InferqError, InvalidTask

_NUMBER = struct.Struct("=Q")
_CLOSED = 3
"""The exit status of a forked process that found the pipe closed."""
_LARGEST_PROFILE = 4 << 20
"""Colour profiles beyond this many bytes are left out."""


class Document(Protocol):
    """What an opener returns."""

    page_count: int

    def page(self, number: int, /) -> RgbImage: ...
    def close(self) -> None: ...


Opener = Callable[..., Document]


def main() -> None:
    """Serve until the pipe closes."""
    opener, fd, pixels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Decoder ends this process
    os.dup2(2, 1)
    pipe = Connection(fd)
    module, _, name = opener.partition(":")
    open_file: Opener = getattr(importlib.import_module(module), name)
    Image.init()  # a forked process would import all plug-ins again
    AvifImagePlugin.DEFAULT_MAX_THREADS = 2
    opened = mmap.mmap(-1, _NUMBER.size)  # shared with the forked processes
    while True:
        # Forked before a file comes, so that no file waits for it.
        status = _fork(open_file, pipe, pixels, opened)
        (number,) = _NUMBER.unpack(opened)
        code = os.waitstatus_to_exitcode(status)
        if code == _CLOSED:
            return
        if code == 0:
            continue
        ended: dict[str, Any] = {"file": number, "signal": -code}
        if code > 0:
            fault = _fault("engine_error", "the decoder process failed; its log has the reason")
            ended = {"file": number, "alive": False, **fault}
        with suppress(OSError):  # the next process finds the pipe closed
            pipe.send_bytes(json.dumps(ended).encode())


def _fork(open_file: Opener, pipe: Connection, pixels: int, opened: mmap.mmap) -> int:
    """Serve one file in a forked process; the status with which it ended."""
    server = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if not die_with(server):
                os._exit(0)
            request = json.loads(pipe.recv_bytes())
            # Anything else is for a file whose process has ended, as the sender knows by now.
            while "open" not in request:
                request = json.loads(pipe.recv_bytes())
            opened[:] = _NUMBER.pack(request["file"])
            _serve(open_file, request, pipe, pixels)
            code = 0
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = _CLOSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def _serve(open_file: Opener, request: dict[str, Any], pipe: Connection, pixels: int) -> None:
    """Open the file and decode the pages that are asked for, until the file is closed."""
    document: Document | None = None
    number, arguments, memory = request["file"], request["arguments"], request["memory"]
    _limit(memory, request["page_bytes"])
    while "close" not in request:
        before = _cpu_seconds()
        _limit_cpu(before + request["seconds"])
        answer: dict[str, Any]
        try:
            if document is None:
                document = open_file(Path(request["open"]), **arguments)
                answer = {"pages": document.page_count}
            else:
                page = document.page(request["page"])
                _write(pixels, page)
                answer = {"shape": page.shape[:2], "profile": _profile(document)}
                del page
        except InferqError as error:
            answer = _fault(error.code, error.message, invalid=isinstance(error, InvalidTask))
        except MemoryError:
            needs = f"the file needs more than {memory >> 20} MiB to decode: send it in a simpler form"
            answer = _fault("decoding_limit", needs, invalid=True)
        except OSError as error:
            answer = {"errno": error.errno or 5}
        except Exception as error:
            answer = _fault("engine_error", f"{type(error).__name__}: {error}")
        answer |= {"file": number, "seconds": _cpu_seconds() - before, "alive": document is not None}
        pipe.send_bytes(json.dumps(answer).encode())
        if document is None:
            return
        request = json.loads(pipe.recv_bytes())


def _fault(code: str, message: str, *, invalid: bool = False) -> dict[str, Any]:
    return {"error": code, "message": message, "invalid": invalid}


def _limit(memory: int, page_bytes: int) -> None:
    """Limit further memory, the size of the shared file of pixels, and core dumps, in bytes."""
    if sys.platform == "linux":  # elsewhere the limit is not enforced, or counts otherwise
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, in_use + memory)
    _lower(resource.RLIMIT_FSIZE, page_bytes)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(kind: int, value: int) -> None:
    """Set a limit, unless the system's own is lower: raising that is not permitted."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _limit_cpu(seconds: float) -> None:
    """Have the kernel end this process with SIGXCPU after so many CPU seconds of its life."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(seconds)
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _cpu_seconds() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def _write(pixels: int, page: RgbImage) -> None:
    rest = np.ascontiguousarray(page).data.cast("B")
    while rest:
        rest = rest[os.pwrite(pixels, rest, page.nbytes - len(rest)) :]


def _profile(document: Document) -> str | None:
    profile = getattr(document, "colour_profile", None)
    return profile.hex() if profile is not None and len(profile) <= _LARGEST_PROFILE else None


if __name__ == "__main__":
    main()
