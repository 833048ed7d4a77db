"""Where the time of a slot's engine goes: it computes, or it waits for a task, an input or a result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

Step = Literal["computing", "input", "task", "result"]
"""What a thread of the slot does: its task is computed, its task is prepared (inputs are fetched), it has no task, or
its task's result is uploaded and recorded."""

_FIRST: tuple[Step, ...] = ("computing", "input", "task", "result")


class EngineClock:
    """Counts the seconds in which a slot's engine is loaded, by what the engine does or waits for.

    A slot has one thread, and one more after each `join`. If they do different things, the first of `computing`,
    `input`, `task`, `result` counts: an upload keeps the engine waiting only while no other thread can bring a task.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._threads: dict[Step, int] = {"computing": 0, "input": 0, "task": 1, "result": 0}
        self._seconds: dict[Step, float] = dict.fromkeys(_FIRST, 0.0)
        self._loaded = False
        self._state: Step | None = None
        self._since = 0.0

    def load(self, loaded: bool) -> None:
        """Say whether an engine is loaded from now on."""
        with self._lock:
            self._loaded = loaded
            self._count()

    def join(self) -> None:
        """A further thread brings tasks from now on."""
        with self._lock:
            self._threads["task"] += 1
            self._count()

    def move(self, before: Step, after: Step) -> None:
        """A thread turns from one step to another."""
        threads = self._threads
        with self._lock:
            threads[before] -= 1
            threads[after] += 1
            self._count()

    def seconds(self) -> Mapping[Step, float]:
        """The seconds of each step up to now."""
        with self._lock:
            seconds = self._seconds.copy()
            if self._state is not None:
                seconds[self._state] += self._clock() - self._since
            return seconds

    def _count(self) -> None:
        threads = self._threads
        state: Step | None = None
        if self._loaded:
            for state in _FIRST:
                if threads[state]:
                    break
        if state != self._state:
            now = self._clock()
            if self._state is not None:
                self._seconds[self._state] += now - self._since
            self._state, self._since = state, now
