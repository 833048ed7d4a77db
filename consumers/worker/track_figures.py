"""Counts what a track's attempts came to, for the heartbeat to bring to Redis."""

from __future__ import annotations

import threading
from collections import Counter

from inferq.storage.tracks import OUTCOMES, bucket_of


class TrackFigures:
    """Counts of outcomes and of buckets of engine seconds, since the worker started. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, outcome: str, engine_seconds: float | None, *, cached: bool) -> None:
        """Count an attempt. Those that say nothing of the engine are left out, such as one that was cancelled."""
        if outcome not in OUTCOMES or cached:
            return
        with self._lock:
            self._counts[outcome] += 1
            if outcome == "succeeded" and engine_seconds is not None:
                self._counts[str(bucket_of(engine_seconds))] += 1

    def counts(self) -> Counter[str]:
        """A copy of the counts, by the names of storage.tracks."""
        with self._lock:
            return self._counts.copy()
