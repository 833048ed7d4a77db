"""How many workers the tasks that wait now need, from the figures of `inferq monitor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor

from inferq.schemas.monitor import ANY_TYPE, Demand, QueueFigures, Stats, TypeDemand, TypeWorkers

DEFAULT_TARGET_WAIT = 300.0
MAX_TARGET_WAIT = 7 * 86_400.0

_LEAST_SECONDS = 0.001
_NOT_READ = "the monitor has not read it"


@dataclass(frozen=True)
class Backlog:
    """The tasks of one type that have not ended.

    `ready` tasks wait in work queues, `unacked` ones are in hand, `unfed` ones are still to be fed by batches.
    `oldest`: seconds that the first task has waited. `seconds`: what a task takes on average; None if unknown.
    """

    ready: int
    unacked: int
    unfed: int = 0
    oldest: float = 0.0
    seconds: float | None = None

    def slots(self, target_wait: float) -> int:
        """The slots with which every task starts within `target_wait` seconds from now.

        At least `unacked`, at most one for each task in the queues and in hand; 0 if there is no task. If the first
        task has waited longer than the target, the target shrinks in the same proportion. If `seconds` is unknown,
        each task gets a slot.

        Of the slots that have a task now, one becomes free every `seconds` / `unacked` seconds. A further slot starts
        a task at once, and another one every `seconds`.
        """
        if not (self.ready or self.unacked or self.unfed):
            return 0
        most = max(1, self.ready + self.unacked)
        if self.seconds is None:
            return most
        target = target_wait if self.oldest <= target_wait else target_wait**2 / self.oldest
        runs = target / max(self.seconds, _LEAST_SECONDS)
        left = max(0, self.ready + self.unfed - floor(self.unacked * runs))
        return min(most, self.unacked + ceil(left / (floor(runs) + 1)))


def demand_of(stats: Stats, target_wait: float = DEFAULT_TARGET_WAIT) -> Demand:
    """The demand of each task type that the monitor reads. What `stats` does not know is None."""
    lanes: dict[str, list[QueueFigures]] = {}
    for lane in stats.queues or ():
        lanes.setdefault(lane.task_type, []).append(lane)
    workers = {each.task_type: each for each in stats.workers or ()}
    unknown = {
        name: stats.unknown.get(source, _NOT_READ)
        for name, source, value in (
            ("types", "queues", stats.queues),
            ("task_seconds", "task_seconds", stats.task_seconds),
            ("unfed", "unfed_tasks", stats.unfed_tasks),
            ("slots", "workers", stats.workers),
            ("retry_messages", "retry_messages", stats.retry_messages),
        )
        if value is None
    }
    unknown |= {
        name: stats.unknown[name] for name in ("unacked", "oldest_seconds") if name in stats.unknown and lanes
    }
    types = {
        name: _of_type(name, found, workers.get(name), stats, target_wait) for name, found in lanes.items()
    }
    for name, each in types.items():
        if each.workers is None:
            missing = "ready" if each.ready is None else "unacked"
            unknown[f"types.{name}.workers"] = f"{missing} is unknown"
    return Demand(
        at=stats.at,
        target_wait=target_wait,
        types=types,
        unfed_any_type=None if stats.unfed_tasks is None else stats.unfed_tasks.get(ANY_TYPE, 0),
        retry_messages=stats.retry_messages,
        unknown=unknown,
    )


def _of_type(
    name: str, lanes: Iterable[QueueFigures], workers: TypeWorkers | None, stats: Stats, target_wait: float
) -> TypeDemand:
    lanes = tuple(lanes)
    ready, unacked = _sum(lane.ready for lane in lanes), _sum(lane.unacked for lane in lanes)
    ages = [lane.oldest_seconds for lane in lanes]
    oldest = None if None in ages else max(age or 0.0 for age in ages)
    unfed = None if stats.unfed_tasks is None else stats.unfed_tasks.get(name, 0)
    seconds = (stats.task_seconds or {}).get(name)
    count = 0 if workers is None else workers.idle + workers.busy + workers.paused + workers.loading
    slots = workers.slots / count if workers is not None and count and workers.slots else None
    wanted = None
    if ready is not None and unacked is not None:
        backlog = Backlog(ready, unacked, unfed or 0, oldest or 0.0, seconds)
        with_tasks = 0 if workers is None else workers.with_tasks
        wanted = max(ceil(backlog.slots(target_wait) / (slots or 1)), with_tasks)
    return TypeDemand(
        workers=wanted,
        ready=ready,
        unacked=unacked,
        unfed=unfed,
        oldest_seconds=oldest,
        task_seconds=seconds,
        work_seconds=None if ready is None or seconds is None else round((ready + (unfed or 0)) * seconds, 1),
        slots=slots,
    )


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None if a part is unknown."""
    found = list(values)
    return None if None in found else sum(value or 0 for value in found)
