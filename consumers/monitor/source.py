"""Figures of one service, read on a thread of their own: a service that hangs delays no other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from inferq.schemas import InferqError, Outage

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Unknown(Exception):
    """The figures are unknown; the message says why, without an address."""


class NotRead(Unknown):
    """The first reading has not ended: whether the service can be used is unknown, too."""


class Source(Generic[T]):
    """Reads by `read` whenever `ask` is called, one reading at a time.

    `service` names it to users. A reading that takes longer than `patience` seconds counts as failed until it ends, and
    so do figures that are older than `keeps` seconds.
    """

    def __init__(
        self, service: str, read: Callable[[], T], *, patience: float, keeps: float = float("inf")
    ) -> None:
        self._service = service
        self._read = read
        self._patience = patience
        self._keeps = keeps
        self._changed = threading.Condition()
        self._asked_at: float | None = None
        self._last: tuple[float, T] | None = None
        self._fault: str | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"monitor {service}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Begin a reading, unless one is in progress."""
        with self._changed:
            if self._asked_at is None:
                self._asked_at = time.monotonic()
                self._changed.notify_all()

    def figures(self, wait: float = 0) -> T:
        """The last figures, after waiting at most `wait` seconds for a reading in progress. Raises Unknown."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked_at is None, wait)
            now = time.monotonic()
            if self._asked_at is not None and now - self._asked_at >= self._patience:
                raise Unknown(f"{self._service} does not answer")
            if self._fault is not None:
                raise Unknown(self._fault)
            if self._last is None:
                raise NotRead(f"{self._service} has not been read yet")
            at, figures = self._last
            if now - at > self._keeps:
                raise Unknown(f"the figures of {self._service} are out of date")
            return figures

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked_at is not None)
            fault = self._try()
            with self._changed:
                self._fault = fault
                self._asked_at = None
                self._changed.notify_all()

    def _try(self) -> str | None:
        """Read. Gives why that failed; None if it did not."""
        try:
            found = self._read()
        except Exception as error:
            # No error may end this thread.
            if not self._failing:  # once, not at each reading
                unforeseen = not isinstance(error, InferqError)
                _log.warning("%s: the figures are unknown: %s", self._service, error, exc_info=unforeseen)
            self._failing = True
            if isinstance(error, Outage):
                return f"{self._service} is unavailable"
            return f"{self._service}: the figures cannot be read; see the monitor's log"
        if self._failing:
            _log.info("%s: the figures are known again", self._service)
        self._failing = False
        self._last = time.monotonic(), found
        return None
