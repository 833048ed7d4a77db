"""A time limit, and a circuit breaker, for object store reads that the gateway can do without."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from anyio import move_on_after

from inferq.producer.gateway.threads import Threads
from inferq.storage.objects.store import StoreOutage

T = TypeVar("T")


class StoreBreaker:
    """Runs blocking reads on threads, each for at most `limit` seconds.

    A read over the limit opens the breaker. While it is open, every read fails at once; each `pause` seconds
    one read is let through, and closes the breaker if it ends within the limit.
    For the event loop's thread alone. `clock` gives monotonic seconds.
    """

    def __init__(
        self, *, limit: float = 2.0, pause: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._pause = pause
        self._clock = clock
        self._open_until: float | None = None

    async def run(self, read: Callable[[], T], threads: Threads) -> T:
        """What `read` returns or raises. Raises StoreOutage if it takes too long or the breaker is open."""
        if self._open_until is not None:
            if self._clock() < self._open_until:
                raise _too_slow()
            self._open()  # for all but this read
        with move_on_after(self._limit) as scope:
            try:
                return await threads.run(read)
            finally:
                if not scope.cancel_called:
                    self._open_until = None
        self._open()
        raise _too_slow()

    def _open(self) -> None:
        self._open_until = self._clock() + self._pause


def _too_slow() -> StoreOutage:
    return StoreOutage("the object store is too slow to answer")
