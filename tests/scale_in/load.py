"""The tasks of a run, drawn from a seed: load that rises and falls, and never quite ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

_PHASES = ((1.5, 2.0, 4.0), (0.2, 9.0, 13.0))
"""Phases that take turns: tasks a second, and how long at least and at most."""
_MEDIAN_SECONDS = 1.5
_LONGEST_SECONDS = 12.0


@dataclass(frozen=True)
class PlannedTask:
    """A task that is due so many seconds after the beginning, and computes for so many seconds."""

    name: str
    due: float
    seconds: float


def draw(seed: int) -> Iterator[PlannedTask]:
    """Tasks without end, in the order in which they fall due. Tasks arrive while workers are removed, too."""
    random = Random(f"scale-in {seed}")
    begins, numbers = 0.0, itertools.count()
    for rate, least, most in itertools.cycle(_PHASES):
        ends = begins + random.uniform(least, most)
        due = begins + random.expovariate(rate)
        while due < ends:
            seconds = min(_LONGEST_SECONDS, _MEDIAN_SECONDS * random.lognormvariate(0, 0.8))
            yield PlannedTask(f"s{seed}-{next(numbers):04d}", due, round(seconds, 2))
            due += random.expovariate(rate)
        begins = ends
