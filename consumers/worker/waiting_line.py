"""Mutual exclusion in the order of arrival, for threads that may not be ready yet when their turn comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class WaitingLine:
    """Holds one place at a time, first come, first served.

    A place counts from `enter`, not from its first `acquire`: a thread that is slow to ask is not overtaken. A
    place that has stepped aside is passed over until it asks again. `len` counts the places.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._places: list[Place] = []
        self._holder: object | None = None
        self._urgent = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def idle(self) -> bool:
        """Whether nobody holds the line or waits for it."""
        with self._changed:
            return self._holder is None and not self._urgent and not any(p.waits for p in self._places)

    @contextmanager
    def enter(self) -> Iterator[Place]:
        """A new place, behind all others."""
        place = Place(self)
        with self._changed:
            self._places.append(place)
            self._changed.notify_all()
        try:
            yield place
        finally:
            place.release()
            with self._changed:
                self._places.remove(place)
                self._changed.notify_all()

    def wait_occupied(self, timeout: float) -> bool:
        """Wait, at most `timeout` seconds, until there is a place."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._places), timeout)

    @contextmanager
    def hold_if_idle(self) -> Iterator[bool]:
        """Hold the line if nobody holds it or waits for it; gives whether that is so."""
        with self._changed:
            idle = self.idle
            if idle:
                self._holder = self
        try:
            yield idle
        finally:
            if idle:
                self._let_go(self)

    @contextmanager
    def hold_first(self) -> Iterator[None]:
        """Hold the line before every place that waits, as soon as it is free."""
        with self._changed:
            self._urgent += 1
            try:
                self._changed.wait_for(lambda: self._holder is None)
                self._holder = self
            finally:
                self._urgent -= 1
        try:
            yield
        finally:
            self._let_go(self)

    def _let_go(self, holder: object) -> None:
        with self._changed:
            if self._holder is holder:
                self._holder = None
                self._changed.notify_all()


class Place:
    """One thread's place in a line."""

    def __init__(self, line: WaitingLine) -> None:
        self._line = line
        self._unfinished = False
        self.waits = True

    @property
    def holds(self) -> bool:
        """Whether the line is held by this place."""
        return self._line._holder is self

    def acquire(self, timeout: float = 0, *, alone: bool = False) -> bool:
        """Hold the line if its turn comes within `timeout` seconds; it goes on waiting otherwise.

        With `alone`, its turn comes only after every place that held the line before has finished.
        """
        line = self._line
        with line._changed:
            if line._holder is self:
                return True
            self.waits = True
            if not line._changed.wait_for(lambda: self._is_next(alone), timeout):
                return False
            line._holder = self
            self._unfinished = True
            self.waits = False
            return True

    def step_aside(self) -> None:
        """Be passed over until `acquire` is called again."""
        with self._line._changed:
            self.waits = False
            self._line._changed.notify_all()

    def release(self) -> None:
        """Let the next place hold the line; this one no longer waits for it."""
        self.step_aside()
        self._line._let_go(self)

    def finish(self) -> None:
        """What the place held the line for has come to its end."""
        with self._line._changed:
            self._unfinished = False
            self._line._changed.notify_all()

    def _is_next(self, alone: bool) -> bool:
        line = self._line
        if line._holder is not None or line._urgent:
            return False
        if alone and any(place._unfinished for place in line._places if place is not self):
            return False
        return next(place for place in line._places if place.waits) is self
