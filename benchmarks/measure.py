"""The measurements. Rounds alternate, so that a slow phase of the machine affects all contestants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.contestants import Contestant


def publish_rates(
    contestants: Sequence[Contestant], *, count: Callable[[Contestant], int], rounds: int
) -> dict[str, float]:
    """Tasks published and confirmed per second, the median of the rounds."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:
        contestant.publish(50)  # warm-up: connections, declarations
    for _ in range(rounds):
        for contestant in contestants:
            number = count(contestant)
            began = time.perf_counter()
            contestant.publish(number)
            rates[contestant.name].append(number / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in rates.items()}


def drain_rates(contestants: Sequence[Contestant], *, count: int, rounds: int) -> dict[str, float]:
    """Tasks per second through one worker, from the first counted start to the last: the median of the rounds."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            tasks = contestant.publish(count)
            with contestant.worker():
                contestant.started(tasks[-1])
                moments = sorted(contestant.started(task) for task in tasks)
            # Leave out the first tenth of the tasks as warm-up.
            first = count // 10
            rates[contestant.name].append((count - 1 - first) / (moments[-1] - moments[first]))
    return {name: statistics.median(found) for name, found in rates.items()}


def idle_latencies(contestants: Sequence[Contestant], *, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds from before the publish to the start of the task's body, with an idle worker."""
    found: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            with contestant.worker():
                contestant.started(contestant.publish(1)[0])
                for _ in range(count):
                    time.sleep(0.03)  # until the worker waits on all its lanes again
                    began = time.time()
                    (task,) = contestant.publish(1)
                    found[contestant.name].append(contestant.started(task) - began)
    return found
