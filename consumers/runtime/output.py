"""What an engine process prints and logs, line by line in the worker's log.

File descriptors 1 and 2 of the engine process, which C code prints to as well, are a pipe to the worker. What the
engine logs goes through it too: records as JSON text sequences (RFC 7464).

The engine never waits for the worker's log. One thread reads the pipe, and drops what is too much; another one logs.
"""

from __future__ import annotations

import contextvars
import ctypes
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from inferq.schemas.logs import LogSettings, fields

LINES_PER_SECOND = 20
BURST_LINES = 200
"""How many lines of an engine process are logged: this many at once, and LINES_PER_SECOND on average."""

LINE_CHARACTERS = 2000
"""A longer line is cut."""

_RECORD = b"\x1e"
_RECORD_BYTES = 64 * 1024
"""The longest line that is kept until its end comes. A record with a stack is one line."""
_READ_BYTES = 64 * 1024
"""What a pipe holds (Linux)."""
_MOST_WAITING = 1000
_CLOSE_SECONDS = 0.5

_LINE_BUFFERED = 1
"""`_IOLBF` of C."""

_log = logging.getLogger("inferq.engine")


class EngineOutput:
    """The worker's end of one engine process's output. `writer` is the descriptor for the engine process.

    `dropped` is called with the number of lines that were not logged. Lines have the context of the task that runs.
    """

    def __init__(self, dropped: Callable[[int], object], ends: tuple[int, int] | None = None) -> None:
        """`ends`: the pipe of a process that has started already."""
        self._pipe, self.writer = ends or os.pipe()
        os.set_blocking(self._pipe, False)
        self._dropped = dropped
        self._lock = threading.Lock()
        self._context = contextvars.Context()
        self._partial = b""
        self._cut = False
        self._closed = False
        self._ended = False
        self._budget = float(BURST_LINES)
        self._counted_at = time.monotonic()
        self._unsaid = 0
        self._lines: queue.SimpleQueue[tuple[contextvars.Context, bytes] | None] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read_all, name="engine output", daemon=True)
        self._logging = threading.Thread(target=self._log_all, name="engine log", daemon=True)

    def start(self) -> None:
        """Log what comes, now that the engine process has its end of the pipe, which is closed here."""
        os.close(self.writer)
        self._reading.start()
        self._logging.start()

    def begin_run(self) -> None:
        """Log later lines with the context of the calling thread's task."""
        with self._lock:
            self._context = contextvars.copy_context()

    def end_run(self) -> None:
        """Log the lines that the task has printed. Later lines belong to no task."""
        with self._lock:
            self._read()
            self._end_line()
            self._context = contextvars.Context()

    def close(self) -> None:
        """Log the rest, now that the engine process has ended.

        Another process that holds the pipe, such as a daemon, keeps nobody waiting: what it prints is discarded.
        """
        with self._lock:
            if self._closed:
                return
            self._read()
            self._end_line()
            self._closed = True
            self._lines.put(None)
        if self._logging.is_alive():
            self._logging.join(_CLOSE_SECONDS)

    def _read_all(self) -> None:
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        while not self._ended:
            poller.poll()
            with self._lock:
                self._read()
        os.close(self._pipe)

    def _read(self) -> None:
        """Take what has come, without waiting."""
        if self._ended:
            return
        try:
            piece = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return
        self._ended = not piece
        if self._closed:
            return
        if self._ended:
            self._end_line()
            self._lines.put(None)
            return
        if self._cut:  # the rest of a line that was too long
            _, newline, piece = piece.partition(b"\n")
            self._cut = not newline
        if self._refill() < 1:  # counting is far cheaper than splitting
            self._drop(piece.count(b"\n"))
            end = piece.rfind(b"\n") + 1
            self._partial = (b"" if end else self._partial) + piece[end:]
        else:
            *lines, self._partial = (self._partial + piece).split(b"\n")
            for line in lines:
                self._put(line)
        if len(self._partial) > _RECORD_BYTES:
            self._end_line()
            self._cut = True

    def _refill(self) -> float:
        now = time.monotonic()
        more = (now - self._counted_at) * LINES_PER_SECOND
        self._budget, self._counted_at = min(self._budget + more, BURST_LINES), now
        return self._budget

    def _put(self, line: bytes) -> None:
        line = line.rstrip(b"\r").rpartition(b"\r")[2]  # a progress bar writes over its line
        if not line.strip():
            return
        if self._budget < 1 or self._lines.qsize() >= _MOST_WAITING:
            self._drop(1)
            return
        self._budget -= 1
        self._say_dropped()
        self._lines.put((self._context, line))

    def _end_line(self) -> None:
        self._put(self._partial)
        self._partial = b""
        self._say_dropped()

    def _drop(self, count: int) -> None:
        self._unsaid += count
        if count:
            self._dropped(count)

    def _say_dropped(self) -> None:
        if self._unsaid:
            said = f"{self._unsaid} lines dropped: the engine prints too fast"
            self._unsaid = 0
            self._lines.put((self._context, said.encode()))

    def _log_all(self) -> None:
        while (item := self._lines.get()) is not None:
            context, line = item
            context.run(_log_line, line)


def _log_line(line: bytes) -> None:
    """Log a line of the engine process: a record, or what was printed."""
    level, message, more = logging.INFO, line.decode("utf-8", "replace"), {}
    if line.startswith(_RECORD):
        with suppress(Exception):
            record = json.loads(line.removeprefix(_RECORD))
            level, message = int(record["level"]), str(record["message"])
            if record["exception"] is not None:
                more["exception"] = str(record["exception"])
    if len(message) > LINE_CHARACTERS:
        message = f"{message[:LINE_CHARACTERS]}... (cut)"
    _log.log(level, "engine: %s", message, extra=fields(**more))


def start_engine_log() -> None:
    """In the engine process: log through the pipe, and let each printed line go there at its end."""
    handler = logging.StreamHandler()
    handler.setFormatter(_RecordFormatter())
    level = logging.getLevelNamesMapping()[LogSettings.load().log_level]
    # Libraries as in `start_log`: below that they log URLs and headers, such as those of a download of weights.
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler])
    logging.getLogger("inferq").setLevel(level)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr] # both are TextIOWrapper here
    with suppress(AttributeError, ValueError):  # `stdout` is a macro elsewhere
        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _LINE_BUFFERED, ctypes.c_size_t(0))


def log_engine(path: str) -> None:
    """In the engine process: the package of an engine (`module:Class`) logs from the same level on as inferq."""
    package = path.partition(":")[0].partition(".")[0]
    logging.getLogger(package).setLevel(logging.getLogger("inferq").level)


def flush_output() -> None:
    """In the engine process: let go what was printed of a line that has not ended."""
    with suppress(Exception):  # the engine may have replaced or closed it
        sys.stdout.flush()


class _RecordFormatter(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        info = record.exc_info
        exception = self.formatException(info) if info and info[0] is not None else None
        said = {"level": record.levelno, "message": record.getMessage(), "exception": exception}
        return _RECORD.decode() + json.dumps(said)
