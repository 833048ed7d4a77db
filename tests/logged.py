"""What a test's own code logs, as a part would write it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
