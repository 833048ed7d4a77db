"""What workers say in their heartbeats, by the names of their pods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from inferq.consumers.scale_in.costs import Statement
from inferq.schemas.monitor import WorkerInfo
from inferq.storage.workers import LIVES_SECONDS, WorkerRegistry


class Hearing:
    """Reads the registry of workers, and remembers for a while what workers said that it no longer has.

    A Redis that lost its data, or cannot be reached, says nothing of a worker that was busy a moment ago.
    """

    def __init__(self, registry: WorkerRegistry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._heard: dict[str, tuple[float, Statement]] = {}

    def listen(self) -> None:
        """Read the registry. Raises StatusOutage."""
        workers = self._registry.read().workers
        now = self._clock()
        for name, statement in statements(workers, datetime.now(UTC)).items():
            self._heard[name] = now - statement.age, statement

    def statements(self) -> Mapping[str, Statement]:
        """What each worker said last, unless that is too long ago."""
        now = self._clock()
        self._heard = {
            name: (at, said) for name, (at, said) in self._heard.items() if now - at <= LIVES_SECONDS
        }
        return {name: replace(said, age=now - at) for name, (at, said) in self._heard.items()}


def statements(workers: Iterable[WorkerInfo], now: datetime) -> dict[str, Statement]:
    """The statement of each worker by its name. Of two with one name, the one that started last lives.

    A worker for several task types has several heartbeats, which started at the same time.
    """
    latest: dict[str, list[WorkerInfo]] = {}
    for worker in workers:
        known = latest.get(worker.name)
        if known is None or worker.since > known[0].since:
            latest[worker.name] = [worker]
        elif worker.since == known[0].since:
            known.append(worker)
    return {name: _statement(of_types, now) for name, of_types in latest.items()}


def _statement(of_types: Sequence[WorkerInfo], now: datetime) -> Statement:
    tasks = [task for worker in of_types for task in worker.tasks]
    return Statement(
        # A paused worker may have a task in hand, which waits for S3 with a result.
        busy=any(worker.busy > 0 or bool(worker.in_hand) for worker in of_types),
        work_seconds=sum(max(0.0, (now - task.since).total_seconds()) for task in tasks),
        priority=of_types[0].consumer_priority,
        age=max(worker.seen_seconds_ago or 0.0 for worker in of_types),
    )
