"""The tasks of a run, drawn from a seed: load that rises and falls, and never quite ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

_RATES = (0.15, 0.6, 1.3)
"""Tasks a second in a phase."""
_PHASE_SECONDS = (4.0, 9.0)
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
    due = phase_ends = 0.0
    rate, number = _RATES[-1], 0
    while True:
        due += random.expovariate(rate)
        if due > phase_ends:
            phase_ends = due + random.uniform(*_PHASE_SECONDS)
            rate = random.choice(_RATES)
        seconds = min(_LONGEST_SECONDS, _MEDIAN_SECONDS * random.lognormvariate(0, 0.8))
        yield PlannedTask(f"s{seed}-{number:04d}", due, round(seconds, 2))
        number += 1
