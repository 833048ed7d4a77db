"""At most so many of a worker's engines are loaded at a time: the least recently used one makes room.

First come, first served. An engine that has no task makes room at once. One whose tasks keep coming may go on for as
long as it took to load, and then to the end of its run. So an engine waits for at most one such turn of each of the
others, and at least half of the time goes into tasks, not into loading.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

_GAP_SECONDS = 0.25
"""How long an engine has no task before it counts as idle: between two tasks of a backlog it is not."""

_LOOK_SECONDS = 0.05
"""How often one that waits checks whether another engine can make room."""


class LoadedEngines:
    """The engines of a worker, at most `most` of which are loaded. Safe from many threads."""

    def __init__(self, most: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._changed = threading.Condition()
        self._loaded: list[EngineRoom] = []
        self._waiting: list[EngineRoom] = []

    @property
    def limited(self) -> bool:
        """Whether engines may have to wait for each other."""
        return self._most < math.inf

    def add(self, make_room: Callable[[], bool]) -> EngineRoom:
        """A further engine. `make_room` unloads it if it computes nothing, calls `leave`, and gives whether it did.

        It is called from other engines' threads.
        """
        return EngineRoom(self, make_room)

    def _most_dispensable(self, refused: set[EngineRoom]) -> EngineRoom | None:
        """The least recently used engine that may have to make room now."""
        if any(room._leaving for room in self._loaded):
            return None
        now = self._clock()
        found = [r for r in self._loaded if r not in refused and (r.is_over(now) or r.is_idle(now))]
        return min(found, key=lambda room: room.used_at, default=None)


class EngineRoom:
    """One engine's claim to be among the loaded ones. `used_at`: when its last run or task ended; its owner sets it."""

    def __init__(self, engines: LoadedEngines, make_room: Callable[[], bool]) -> None:
        self._engines = engines
        self._make_room = make_room
        self._turn_ends = math.inf
        self._leaving = False
        self.used_at = 0.0

    def ask(self, timeout: float = 0) -> bool:
        """Whether the engine may be loaded, within `timeout` seconds; it goes on waiting otherwise.

        To unload another engine may take a second more.
        """
        engines = self._engines
        deadline = time.monotonic() + timeout
        refused: set[EngineRoom] = set()
        while True:
            with engines._changed:
                if self._enter():
                    return True
                first = engines._waiting[0] is self
                other = engines._most_dispensable(refused) if first else None
                if other is None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return False
                    engines._changed.wait(min(left, _LOOK_SECONDS))
                    refused.clear()
                    continue
            if not other._make_room():
                refused.add(other)

    def note_loaded(self, seconds: float) -> None:
        """The engine is loaded, which took so many seconds: its turn begins."""
        self.used_at = now = self._engines._clock()
        self._turn_ends = now + seconds

    def must_yield(self) -> bool:
        """Whether this loaded engine has to make room before its next task: then it unloads, and calls `leave`."""
        engines = self._engines
        with engines._changed:
            coming = engines._most - len(engines._loaded) + sum(room._leaving for room in engines._loaded)
            self._leaving = (
                self in engines._loaded and self.is_over(engines._clock()) and len(engines._waiting) > coming
            )
            return self._leaving

    def leave(self) -> None:
        """The engine is unloaded."""
        engines = self._engines
        with engines._changed:
            self._leaving, self._turn_ends = False, math.inf
            if self in engines._loaded:
                engines._loaded.remove(self)
                engines._changed.notify_all()

    def withdraw(self) -> None:
        """No task waits for the engine any more."""
        engines = self._engines
        with engines._changed:
            if self in engines._waiting:
                engines._waiting.remove(self)
                engines._changed.notify_all()

    def is_over(self, now: float) -> bool:
        """Whether its turn is over."""
        return now >= self._turn_ends

    def is_idle(self, now: float) -> bool:
        """Whether it has computed nothing for a while. It may compute right now."""
        return now - self.used_at >= _GAP_SECONDS

    def _enter(self) -> bool:
        engines = self._engines
        if self in engines._loaded:
            return True
        if self not in engines._waiting:
            engines._waiting.append(self)
        if engines._waiting[0] is not self or len(engines._loaded) >= engines._most:
            return False
        engines._waiting.pop(0)
        engines._loaded.append(self)
        engines._changed.notify_all()
        return True
