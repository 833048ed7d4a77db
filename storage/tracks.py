"""What the attempts of each track came to, by slices of time: for `inferq canary report`.

inferq:tracks:<type>:<slice>   counts of one slice of 5 minutes: fields `<track>:<outcome>` and, for the engine
                               seconds of successes, `<track>:<bucket>`; kept for 2 days

Workers add to them with their heartbeats, so no task waits for this. What it takes in Redis depends on time, types and
tracks, not on the number of tasks. The seconds of a success go to one of the buckets of a logarithmic scale, so that
each quantile is right within 5 % (as in DDSketch, Masson et al., VLDB 2019).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from inferq.storage.lua import read_lua
from inferq.storage.status.index import StatusIndex

TrackOutcome = Literal["succeeded", "failed", "retried"]
"""Attempts that say something of their track. `retried` is a failed attempt that another one follows."""
OUTCOMES: tuple[TrackOutcome, ...] = get_args(TrackOutcome)

SLICE_SECONDS = 300
KEPT_SECONDS = 2 * 86_400

_GROWTH = 1.1
"""Each bucket is this much wider than the one before it."""
_SHORTEST = 0.001
"""Seconds of the first bucket; shorter runs count in it."""
_PREFIX = "inferq:tracks:"

ADD = read_lua(Path(__file__).with_name("track_add"))


def bucket_of(seconds: float) -> int:
    """The bucket that these seconds belong to."""
    return max(0, math.ceil(math.log(max(seconds, _SHORTEST) / _SHORTEST, _GROWTH)))


def seconds_of(bucket: int) -> float:
    """The seconds that stand for a bucket: at most 5 % from each of its values."""
    return _SHORTEST * _GROWTH**bucket * 2 / (1 + _GROWTH)


@dataclass
class TrackCounts:
    """The attempts of one track, and how many of its successes are in each bucket of engine seconds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    buckets: Counter[int] = field(default_factory=Counter)

    @property
    def attempts(self) -> int:
        return sum(self.outcomes[outcome] for outcome in OUTCOMES)

    @property
    def failures(self) -> int:
        return self.attempts - self.outcomes["succeeded"]


class TrackRecords:
    """Adds and reads the counts."""

    def __init__(self, index: StatusIndex) -> None:
        self._index = index
        self._add = index.quiet_script(ADD)

    def add(self, task_type: str, track: str, counts: Mapping[str, int]) -> bool:
        """Add counts of outcomes and buckets. False if Redis did not take them; that never counts as an outage."""
        pairs = [part for name, count in counts.items() for part in (f"{track}:{name}", count)]
        return self._add([], [f"{_PREFIX}{task_type}:", SLICE_SECONDS, KEPT_SECONDS, *pairs])

    def read(self, task_type: str, seconds: float) -> dict[str, TrackCounts]:
        """The counts of each track in the last `seconds`, which are rounded up to whole slices.

        Raises StatusOutage.
        """
        ((now, _),) = self._index.read(("TIME",))
        last = int(now) // SLICE_SECONDS
        first = math.floor((int(now) - seconds) / SLICE_SECONDS)
        keys = [f"{_PREFIX}{task_type}:{number}" for number in range(first, last + 1)]
        found: dict[str, TrackCounts] = {}
        for fields in self._index.read(*(("HGETALL", key) for key in keys)):
            for name, value in fields.items():
                track, _, counted = name.partition(":")
                counts = found.setdefault(track, TrackCounts())
                if counted.isdigit():
                    counts.buckets[int(counted)] += int(value)
                else:
                    counts.outcomes[counted] += int(value)
        return found
