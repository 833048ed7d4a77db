"""Registry of live workers in Redis, with their unacked tasks and delivery counts.

inferq:w:<worker id>   the JSON of a WorkerInfo; it expires with the heartbeat
inferq:workers         the ids by the time of their last heartbeat, trimmed at each heartbeat
inferq:taken           deliveries taken of each lane, `<type>.<priority>`, by all workers together, and those of
                       them that were requeued, `<type>.<priority>.requeued`

Only the clock of Redis counts, because those of the workers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from inferq.schemas import Priority
from inferq.schemas.encoding import to_json
from inferq.schemas.monitor import Lane, WorkerInfo
from inferq.storage.lua import read_lua
from inferq.storage.status.index import StatusIndex

HEARTBEAT_SECONDS = 5.0
"""From one heartbeat to the next, if nothing changes."""
LIVES_SECONDS = 20
"""How long a worker counts as alive after a heartbeat."""
MAX_WORKERS = 1000
"""The most workers that one listing holds."""

_INDEX = "inferq:workers"
_TAKEN = "inferq:taken"
_RECORD = "inferq:w:"
_REQUEUED = ".requeued"

_HERE = Path(__file__)
BEAT = read_lua(_HERE.with_name("worker_beat"))
LIST = read_lua(_HERE.with_name("worker_list"))

_NONE: Mapping[Lane, int] = {}


@dataclass(frozen=True)
class Registered:
    """The workers that are alive, the newest heartbeat last, and the deliveries taken of each lane."""

    workers: tuple[WorkerInfo, ...]
    taken: Mapping[str, int]

    def taken_of(self, task_type: str, priority: Priority) -> int:
        return self.taken.get(_lane(task_type, priority), 0)

    def requeued_of(self, task_type: str, priority: Priority) -> int:
        return self.taken.get(_lane(task_type, priority) + _REQUEUED, 0)

    def explain(self, consumers: int, task_type: str, priority: Priority) -> bool:
        """Whether these workers may have all the consumers of a lane. Others count no delivery."""
        most = sum(
            worker.slots if worker.consumers is None else worker.consumers
            for worker in self.workers
            if worker.task_type == task_type and priority in worker.lanes
        )
        return consumers <= most


class WorkerRegistry:
    """The registry of all workers. Safe from many threads."""

    def __init__(self, index: StatusIndex) -> None:
        self._index = index
        self._beat = index.quiet_script(BEAT)
        self._list = index.script(LIST)

    def beat(
        self, worker: WorkerInfo, taken: Mapping[Lane, int], requeued: Mapping[Lane, int] = _NONE
    ) -> bool:
        """Record a heartbeat in one round trip, and the deliveries `taken` since the last one that succeeded.

        `requeued` counts those that the worker gave back.
        False if Redis did not take it. That never counts as an outage: no task waits for a heartbeat.
        """
        return self._write(worker.worker_id, to_json(worker), taken, requeued)

    def end(self, worker_id: str, taken: Mapping[Lane, int], requeued: Mapping[Lane, int] = _NONE) -> bool:
        """Remove a worker that ends."""
        return self._write(worker_id, "", taken, requeued)

    def read(self) -> Registered:
        """The workers that are alive, at most MAX_WORKERS. Raises StatusOutage."""
        workers, counts = self._list([_INDEX, _TAKEN], [_RECORD, MAX_WORKERS])
        found = (_read(text, float(age)) for text, age in workers)
        taken = dict(zip(counts[::2], map(int, counts[1::2]), strict=True))
        return Registered(tuple(worker for worker in found if worker is not None), taken)

    def _write(
        self, worker_id: str, text: str, taken: Mapping[Lane, int], requeued: Mapping[Lane, int]
    ) -> bool:
        counts: list[str | int] = []
        for (task_type, priority), count in taken.items():
            counts += (_lane(task_type, priority), count)
        for (task_type, priority), count in requeued.items():
            counts += (_lane(task_type, priority) + _REQUEUED, count)
        return self._beat(
            [_RECORD + worker_id, _INDEX, _TAKEN],
            [worker_id, text, LIVES_SECONDS, self._index.retention, *counts],
        )


def _lane(task_type: str, priority: Priority) -> str:
    return f"{task_type}.{priority}"


def _read(text: str, age: float) -> WorkerInfo | None:
    try:
        worker = WorkerInfo.model_validate_json(text)
    except ValidationError:
        return None  # written by another version
    return worker.model_copy(update={"seen_seconds_ago": max(0.0, age)})
