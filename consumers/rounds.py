"""Rounds at an interval, until a signal ends them: how the monitor and the scale-in guard work."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress


class Rounds:
    """Rounds, one after another. A signal handler may stop them: it does no more than to put into a queue."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stops: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stop(self) -> None:
        """End `run` after the present round."""
        self._stops.put(None)

    def run(self, make_round: Callable[[], None], interval: float) -> None:
        """Begin a round every `interval` seconds, or at once after one that took longer. Returns when stopped."""
        while True:
            began = self._clock()
            make_round()
            with suppress(queue.Empty):
                self._stops.get(timeout=max(0.0, interval - (self._clock() - began)))
                return
