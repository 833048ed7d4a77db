"""Sends this worker's heartbeat to Redis: state, tasks in hand, unavailable services.

On a thread of its own, off every task's path. Redis may be unavailable: nothing waits for a heartbeat.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

from inferq.consumers.runtime.gpus import Gpus
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.slot import Slot
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import Priority
from inferq.schemas.monitor import Lane, TaskInHand, WorkerInfo, WorkerState
from inferq.storage.tracks import TrackRecords
from inferq.storage.workers import HEARTBEAT_SECONDS, WorkerRegistry

_LOOK_SECONDS = 1.0
"""The shortest time between two heartbeats, unless the worker turns busy or idle: that is sent at once."""
_IDLE_SECONDS = 0.2
"""How long a worker has no task before it says so: between two tasks of a backlog it is not idle."""
_REST_SECONDS = 0.05
"""The shortest time between two looks: tasks may come and go by the thousand."""
_GPU_SECONDS = 10.0
"""How often the driver is asked for the memory of the GPUs."""

_log = logging.getLogger(__name__)


class _Counts(NamedTuple):
    """Deliveries of each lane."""

    taken: Counter[Priority]
    requeued: Counter[Priority]


class Heartbeat(threading.Thread):
    """Sends a heartbeat every few seconds, within a second of a change, and at once if it turns busy or idle.

    A worker for several task types sends one for each, all with the same `since` (when it started).
    """

    def __init__(
        self, services: WorkerServices, slots: Sequence[Slot], gpus: Gpus, since: datetime | None = None
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        host, pid = socket.gethostname(), os.getpid()
        self.worker_id = f"{host}-{pid}-{secrets.token_hex(3)}"
        self._services = services
        self._slots = slots
        self._gpus = gpus
        self._registry = WorkerRegistry(services.status)
        self._track_records = TrackRecords(services.status)
        self._next_gpus = 0.0
        self._stopped = threading.Event()
        self._reported = _Counts(Counter(), Counter())
        self._track_reported: Counter[str] = Counter()
        self._info = WorkerInfo(
            worker_id=self.worker_id,
            name=services.settings.worker_name,
            track=services.settings.track or None,
            host=host,
            pid=pid,
            task_type=services.task_type.name,
            lanes=services.settings.lanes,
            state="loading",
            slots=len(slots),
            consumers=sum(slot.consumers for slot in slots),
            consumer_priority=services.consumer_priority,
            busy=0,
            version=version("inferq"),
            since=since or datetime.now(UTC),
        )

    def run(self) -> None:
        said: WorkerInfo | None = None
        said_at, failed = float("-inf"), False
        while not self._stopped.is_set():
            self._services.hand_changed.clear()
            try:
                info = self.info()
                if said is not None and said.busy and not info.busy:
                    self._stopped.wait(_IDLE_SECONDS)
                    info = self.info()
                if _is_due(info, said, time.monotonic() - said_at) and self._beat(info):
                    said, said_at = info, time.monotonic()
            except Exception:
                if not failed:  # once, not each second
                    _log.exception("cannot send heartbeats; still retrying")
                failed = True
            self._stopped.wait(_REST_SECONDS)
            self._services.hand_changed.wait(_LOOK_SECONDS)

    def stop(self) -> None:
        """Remove the worker from the registry and end the thread."""
        self._stopped.set()
        self._services.hand_changed.set()
        if self.is_alive():
            self.join(5)
        self._beat_track()
        counts = self._counts()
        self._registry.end(self.worker_id, *self._new(counts))

    def info(self) -> WorkerInfo:
        """The worker as it is now."""
        in_hand = [run for slot in self._slots for run in slot.in_hand]
        busy = sum(slot.busy for slot in self._slots)
        paused_for = self.paused_for()
        loading = sum(slot.loading for slot in self._slots)
        state: WorkerState = "idle"
        if paused_for:
            state = "paused"
        elif busy:
            state = "busy"
        elif loading:
            state = "loading"
        if time.monotonic() >= self._next_gpus:
            self._next_gpus = time.monotonic() + _GPU_SECONDS
            self._info = self._info.model_copy(update={"gpus": self._gpus.memory()})
        return self._info.model_copy(
            update={
                "state": state,
                "busy": busy,
                "consumers": sum(slot.consumers for slot in self._slots),
                "in_hand": dict(Counter(run.lane for run in in_hand)),
                "tasks": tuple(task for run in in_hand if (task := _task(run)) is not None),
                "engine": next((slot.engine for slot in self._slots if slot.engine is not None), None),
                "paused_for": paused_for,
            }
        )

    def paused_for(self) -> tuple[str, ...]:
        """The services that it waits for, without the reasons: those name addresses."""
        names = [text.partition(":")[0] for text in self._services.pauses()]
        if any(slot.disconnected for slot in self._slots):
            names.append("RabbitMQ")
        return tuple(dict.fromkeys(names))

    def _beat(self, info: WorkerInfo) -> bool:
        counts = self._counts()
        if not self._registry.beat(info, *self._new(counts)):
            return False
        self._reported = counts
        self._beat_track()
        return True

    def _beat_track(self) -> None:
        """Report what the track's attempts came to since the last report that Redis took."""
        track, counts = self._info.track, self._services.track_figures.counts()
        new = counts - self._track_reported
        if track and new and self._track_records.add(self._info.task_type, track, new):
            self._track_reported = counts

    def _counts(self) -> _Counts:
        taken, requeued = Counter[Priority](), Counter[Priority]()
        for slot in self._slots:
            # In this order: a delivery is taken before it is requeued.
            requeued.update(slot.requeued)
            taken.update(slot.taken)
        return _Counts(taken, requeued)

    def _new(self, counts: _Counts) -> tuple[dict[Lane, int], ...]:
        """The deliveries taken and requeued since the last heartbeat that Redis took."""
        task_type = self._info.task_type
        return tuple(
            {(task_type, lane): count for lane, count in (now - before).items()}
            for now, before in zip(counts, self._reported, strict=True)
        )


def _is_due(info: WorkerInfo, said: WorkerInfo | None, seconds: float) -> bool:
    """Whether to send a heartbeat, so many `seconds` after the last one."""
    if said is None or bool(info.busy) != bool(said.busy):
        return True
    return seconds >= (HEARTBEAT_SECONDS if info == said else _LOOK_SECONDS)


def _task(run: TaskRun) -> TaskInHand | None:
    """The task of a run; None while its message is not read."""
    task = run.task
    if task is None:
        return None
    return TaskInHand(tenant=task.tenant, task_id=task.task_id, priority=run.lane, since=run.arrived_at)
