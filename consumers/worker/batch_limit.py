"""How many tasks an engine computes together: fewer after memory ran out, and more again after it did not."""

from __future__ import annotations

_GOOD_BATCHES = 16
"""After so many batches of the size that is allowed, twice as many tasks are tried."""


class BatchLimit:
    """A limit that is halved when memory runs out for a batch, and doubled again after batches that worked.

    No limit at first. Not safe from several threads: the task that holds the engine calls it.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._good = 0

    def within(self, most: int) -> int:
        """The most tasks in a batch of an engine that takes `most`; at least 1."""
        if self._limit is not None and self._limit >= most:
            self._limit = None  # it has grown back, or the engine takes fewer now
        return most if self._limit is None else self._limit

    def shrink(self, size: int) -> None:
        """Memory ran out for a batch of at most `size` tasks."""
        self._limit, self._good = max(1, size // 2), 0

    def worked(self, size: int) -> None:
        """A batch of `size` tasks was computed."""
        if self._limit is None or size < self._limit:
            return
        self._good += 1
        if self._good >= _GOOD_BATCHES:
            self._limit, self._good = self._limit * 2, 0
