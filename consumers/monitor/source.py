"""Figures of one service, read on a thread of their own: a service that hangs delays no other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, NamedTuple, TypeVar

from inferq.schemas import InferqError, Outage

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unknown:
    """The figures are unknown; `reason` names no address.

    `outage`: the service is unavailable. Otherwise it may only be slow, or not read yet.
    """

    reason: str
    outage: bool = False


class Reading(NamedTuple, Generic[T]):
    """Figures, and when they were read."""

    at: datetime
    figures: T


class Source(Generic[T]):
    """Reads by `read` whenever `ask` is called, one reading at a time.

    `service` names it to users. Figures are known for `keeps` seconds, unless a later reading fails. A reading may take
    any time.
    """

    def __init__(
        self,
        service: str,
        read: Callable[[], T],
        *,
        keeps: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._service = service
        self._read = read
        self._keeps = keeps
        self._clock = clock
        self._changed = threading.Condition()
        self._asked = False
        self._last: tuple[float, Reading[T]] | None = None
        self._fault: Unknown | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"monitor {service}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Begin a reading, unless one is in progress."""
        with self._changed:
            self._asked = True
            self._changed.notify_all()

    def figures(self, wait: float = 0) -> Reading[T] | Unknown:
        """The last figures, after waiting at most `wait` seconds for a reading in progress."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asked, wait)
            if self._fault is not None:
                return self._fault
            if self._last is None:
                return Unknown(f"{self._service} has not been read yet")
            ended, reading = self._last
            if time.monotonic() - ended <= self._keeps:
                return reading
            return Unknown(f"the figures of {self._service} are out of date")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked)
            fault = self._try()
            with self._changed:
                self._fault = fault
                self._asked = False
                self._changed.notify_all()

    def _try(self) -> Unknown | None:
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
                return Unknown(f"{self._service} is unavailable", outage=True)
            return Unknown(f"{self._service}: the figures cannot be read; see the monitor's log")
        if self._failing:
            _log.info("%s: the figures are known again", self._service)
        self._failing = False
        self._last = time.monotonic(), Reading(self._clock(), found)
        return None
