"""The measurements. Each gives plain numbers; rounds alternate, so that a slow spell hits all contestants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.contestants import Contestant


def publish_rates(
    contestants: Sequence[Contestant], *, count: Callable[[Contestant], int], rounds: int
) -> dict[str, float]:
    """Tasks published and confirmed per second: the median of the rounds."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:
        contestant.publish(50)  # connections, declarations
    for _ in range(rounds):
        for contestant in contestants:
            number = count(contestant)
            began = time.perf_counter()
            contestant.publish(number)
            rates[contestant.name].append(number / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in rates.items()}


def drain_rates(contestants: Sequence[Contestant], *, count: int, rounds: int) -> dict[str, float]:
    """Tasks per second through one worker, from the first task's start to the last one's: the median."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            tasks = contestant.publish(count)
            with contestant.worker():
                contestant.started(tasks[-1])
                moments = sorted(contestant.started(task) for task in tasks)
            # Its own start-up, the first tenth of the tasks warm.
            first = count // 10
            rates[contestant.name].append((count - 1 - first) / (moments[-1] - moments[first]))
    return {name: statistics.median(found) for name, found in rates.items()}


def idle_latencies(contestants: Sequence[Contestant], *, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds from before the publish to the start of the task's body, with nothing else to do."""
    found: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            with contestant.worker():
                contestant.started(contestant.publish(1)[0])
                for _ in range(count):
                    time.sleep(0.03)  # idle: the worker waits again, in all its lanes
                    began = time.time()
                    (task,) = contestant.publish(1)
                    found[contestant.name].append(contestant.started(task) - began)
    return found
