"""The worker: one light process that takes tasks of one or several types and has them computed, in slots.

The life of a delivery: parse → already ended, cancelled or expired? → fetch the inputs → run in the slot's
engine process → upload the artifacts → write `result.json` once → status → ack.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Literal

from prometheus_client import make_wsgi_app

from inferq.broker import BrokerSettings, Publisher, topology_for
from inferq.broker.lanes import LEAST_PRIORITY
from inferq.consumers.runtime.gpus import Gpus
from inferq.consumers.runtime.process_tree import adopt_orphans, end_orphans
from inferq.consumers.worker.heartbeat import Heartbeat
from inferq.consumers.worker.lease_renewer import LeaseRenewer
from inferq.consumers.worker.loaded_engines import LoadedEngines
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.result_cache import ResultCache
from inferq.consumers.worker.scratch import ScratchFolder
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.settings import WorkerSettings
from inferq.consumers.worker.slot import Slot
from inferq.schemas import TaskType
from inferq.schemas.probe_server import Health, ProbeServer, Readiness
from inferq.schemas.trace_metrics import SpansDropped
from inferq.storage import Fetcher, ResultStore, StatusIndex, StorageSettings, open_store

_log = logging.getLogger(__name__)

Request = Literal["stop", "hurry", "reload"]

_WATCH_SECONDS = 2.0
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def priority_by_age(started: datetime) -> int:
    """The consumer priority of a worker: lower by 1 for each tenth of a second that it started later.

    It begins anew every 3.4 years. Then the order of the workers from before and after is wrong, which does no harm.
    """
    return -(int((started - _EPOCH).total_seconds() * 10) % -LEAST_PRIORITY)


class Worker:
    """Works for its task types until `stop`. Each type has its own slots and its own heartbeat.

    `stop` and `reload` may be called from any thread. Signal handlers put into `requests`, which `run` serves: in
    a handler, a lock that the interrupted code holds would block for ever.
    """

    def __init__(
        self,
        task_types: Sequence[TaskType],
        settings: WorkerSettings,
        broker: BrokerSettings,
        storage: StorageSettings,
    ) -> None:
        self._settings = settings
        self.metrics = WorkerMetrics(tenants=settings.metrics_tenants, track=settings.track)
        self.metrics.registry.register(SpansDropped())
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        store = open_store(storage)
        results = ResultStore(store)
        self._publisher = Publisher(
            broker,
            name=settings.worker_name,
            topology=topology_for([task_type.name for task_type in task_types]),
        )
        self._status = StatusIndex.from_settings(storage)
        self._scratch = ScratchFolder(settings.scratch_dir)
        fetcher, started = Fetcher(store, storage), datetime.now(UTC)
        engines, most = settings.slots * len(task_types), settings.max_loaded
        loaded_engines = LoadedEngines() if most is None or most >= engines else LoadedEngines(most)
        lease_renewer = LeaseRenewer()
        self._services = [
            WorkerServices(
                settings=settings,
                task_type=task_type,
                store=store,
                results=results,
                fetcher=fetcher,
                status=self._status,
                publisher=self._publisher,
                metrics=self.metrics,
                scratch=self._scratch,
                cache=ResultCache(task_type, store, results) if settings.result_cache else None,
                consumer_priority=priority_by_age(started) if settings.oldest_first else 0,
                loaded_engines=loaded_engines,
                lease_renewer=lease_renewer,
            )
            for task_type in task_types
        ]
        numbers = iter(range(engines))
        slots = [
            [Slot(number, services, broker) for number in islice(numbers, settings.slots)]
            for services in self._services
        ]
        self._slots = [slot for of_type in slots for slot in of_type]
        if len(task_types) > 1:  # log lines name slots
            for task_type, of_type in zip(task_types, slots, strict=True):
                _log.info("%s: %s", task_type.name, ", ".join(slot.name for slot in of_type))
        gpus = Gpus(self._engine_pids)
        self.metrics.registry.register(gpus)
        self.metrics.busy_slots.set_function(lambda: sum(slot.busy for slot in self._slots))
        self.metrics.ready_slots.set_function(lambda: sum(not slot.loading for slot in self._slots))
        self.metrics.loaded_engines.set_function(
            lambda: sum(slot.engine_state == "loaded" for slot in self._slots)
        )
        self._heartbeats = [
            Heartbeat(services, of_type, gpus, started)
            for services, of_type in zip(self._services, slots, strict=True)
        ]
        # Also while a slot reconnects, which is no call of `services`.
        self.metrics.paused.labels("RabbitMQ").set_function(
            lambda: any(slot.disconnected for slot in self._slots)
        )
        self._next_watch = 0.0
        self.probes: ProbeServer | None = None
        if settings.probe_port is not None:
            self.probes = ProbeServer(
                settings.probe_host,
                settings.probe_port,
                health=self.health,
                readiness=self.readiness,
                metrics=make_wsgi_app(self.metrics.registry),
            )

    def run(self) -> None:
        """Work until stopped. Raises InstallationError if the engine or the Redis here cannot be used."""
        adopt_orphans()
        self._status.require_supported()
        self._publisher.start()
        for heartbeat in self._heartbeats:  # first: the monitor calls consumers without a heartbeat unknown
            heartbeat.start()
        for slot in self._slots:
            slot.start()
        if self.probes is not None:
            self.probes.start()
        try:
            while any(slot.is_alive() for slot in self._slots):
                with suppress(queue.Empty):
                    self._serve(self.requests.get(timeout=0.2))
                self._watch()
                self._stop_together()
                self._stop_if_idle()
        finally:
            self.stop(hurry=True)
            for heartbeat in self._heartbeats:
                heartbeat.stop()
            self._publisher.close()
            self._scratch.close()
            end_orphans()
            if self.probes is not None:
                self.probes.close()
        for slot in self._slots:
            if slot.fatal is not None:
                raise slot.fatal

    def _watch(self) -> None:
        """Every few seconds: see to runs that nothing else ends, and to processes that engines left behind."""
        if time.monotonic() >= self._next_watch:
            self._next_watch = time.monotonic() + _WATCH_SECONDS
            for slot in self._slots:
                slot.watch()
            end_orphans()

    @property
    def _stopping(self) -> bool:
        return any(services.stopping for services in self._services)

    def _stop_together(self) -> None:
        """An error that ends one type's slots ends the worker."""
        if self._stopping and not all(services.stopping for services in self._services):
            self.stop()

    def _stop_if_idle(self) -> None:
        limit = self._settings.exit_idle
        if limit is None or self._stopping:
            return
        if all(slot.idle_seconds >= limit for slot in self._slots):
            _log.info("no task for %g s (INFERQ_EXIT_IDLE): the worker exits", limit)
            # Nobody waits for this worker to end: a task that it takes at this moment may run to its end.
            self._stop(math.inf)

    def _engine_pids(self) -> dict[str, int]:
        return {
            str(number): pid
            for number, slot in enumerate(self._slots)
            if slot.engine_state != "unloaded" and (pid := slot.engine_pid) is not None
        }

    def _serve(self, request: Request) -> None:
        match request:
            case "stop":
                self.stop()
            case "hurry":
                self.stop(hurry=True)
            case "reload":
                self.reload()

    def stop(self, *, hurry: bool = False) -> None:
        """Take no more tasks. Finish those in hand within the grace period, or requeue them at once (`hurry`)."""
        self._stop(0.0 if hurry else self._settings.grace_seconds)

    def _stop(self, grace: float) -> None:
        for services in self._services:
            services.stop(grace)
        for slot in self._slots:
            slot.stop_consuming()

    def reload(self) -> None:
        """Load new engines beside the running ones, and swap between two tasks."""
        for slot in self._slots:
            slot.reload()

    def health(self) -> Health:
        """Whether every slot makes progress, and for how many seconds each has been running a task."""
        faults = tuple(fault for slot in self._slots if (fault := slot.fault) is not None)
        running = {slot.name: slot.run_seconds for slot in self._slots}
        return Health(faults, {name: round(s, 1) for name, s in running.items() if s is not None})

    def readiness(self) -> Readiness:
        """Ready while all engines are loaded, or load for the next task, or a task is in hand.

        `waiting_for`: why no task is taken now. `notes`: which engines are unloaded.

        Of several pods, Kubernetes deletes one that is not ready first. So a worker stays ready while it waits for a
        service: it may hold a result that it cannot store yet.
        """
        ready = not any(slot.loading for slot in self._slots) or any(slot.in_hand for slot in self._slots)
        waiting = [reason for slot in self._slots if (reason := slot.waiting_for)]
        waiting += dict.fromkeys(pause for services in self._services for pause in services.pauses())
        if self._stopping:
            waiting.append("the worker is shutting down")
        notes = (
            ()
            if not ready
            else tuple(
                f"{slot.name}: the engine is unloaded: idle"
                for slot in self._slots
                if slot.engine_state == "unloaded" and not slot.in_hand
            )
        )
        return Readiness(ready, tuple(waiting), notes)
