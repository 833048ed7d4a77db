"""What a test's own code logs, as a part would write it."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from inferq.schemas.logs import PartFormatter


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self.setFormatter(PartFormatter("json", "test"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@contextmanager
def logged(name: str, level: int = logging.DEBUG) -> Iterator[list[dict[str, Any]]]:
    """The lines of a logger, for as long as the block lasts."""
    logger, handler = logging.getLogger(name), _Lines()
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def log_kept() -> Iterator[None]:
    """Undo at the end what a part's `start_log` changes in this process: later tests read their own logs."""
    root, ours = logging.getLogger(), logging.getLogger("inferq")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    names = ("logThreads", "logProcesses", "logMultiprocessing")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(logging, name, getattr(logging, name))
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(threading, "excepthook", threading.excepthook)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.handlers[:] = handlers
            root.setLevel(levels[0])
            ours.setLevel(levels[1])
