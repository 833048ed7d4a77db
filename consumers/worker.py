"""The worker: one light process that takes tasks one at a time per slot and has them computed.

The life of a delivery: parse → ended, cancelled or expired already? → fetch the inputs into a scratch
folder → run in the slot's engine process → upload the artifacts → write `result.json` once → status → ack.
"""

from __future__ import annotations

import gc
import logging
import math
import queue
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from broker import BrokerSettings, Consumer, Publisher, backoff, topology_for, work_queue
from consumers.device_memory import DeviceMemory
from consumers.engine_process import EngineProcess, MemoryLimits, RunAborted, Wear
from consumers.metrics import WorkerMetrics
from consumers.probes import ProbeServer, Readiness
from consumers.result_cache import ResultCache
from consumers.scratch import ScratchFolder
from consumers.settings import WorkerSettings
from consumers.surroundings import GracePassed, Surroundings
from consumers.task_run import TaskRun
from schemas import (
    Event,
    InferqError,
    InstallationError,
    InvalidTask,
    Result,
    Task,
    TaskType,
    TransientFailure,
    parse_task,
)
from storage import Fetcher, ResultStore, StatusIndex, StorageSettings, open_store

_log = logging.getLogger(__name__)

Request = Literal["stop", "hurry", "reload"]

_IDLE_LOOK_SECONDS = 0.5
"""How long an idle slot waits for a task before it looks after its engine."""


class Worker:
    """Works for one task type until it is told to stop.

    `stop` and `reload` may be called from any thread. Signal handlers use `requests`, which `run` serves: a
    lock that the interrupted code holds would stop them for good.
    """

    def __init__(
        self,
        task_type: TaskType,
        settings: WorkerSettings,
        broker: BrokerSettings,
        storage: StorageSettings,
    ) -> None:
        self._task_type = task_type
        self._settings = settings
        self._broker = broker
        self.metrics = WorkerMetrics()
        self.metrics.registry.register(DeviceMemory())
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        store = open_store(storage)
        results = ResultStore(store)
        self._publisher = Publisher(
            broker, name=settings.worker_name, topology=topology_for([task_type.name])
        )
        self._surroundings = Surroundings(
            settings=settings,
            task_type=task_type,
            store=store,
            results=results,
            fetcher=Fetcher(store, storage),
            status=StatusIndex.from_settings(storage),
            publisher=self._publisher,
            metrics=self.metrics,
            scratch=ScratchFolder(settings.scratch_dir),
            cache=ResultCache(task_type, store, results) if settings.result_cache else None,
        )
        self._slots = [_Slot(number, self._surroundings, broker) for number in range(settings.slots)]
        self.metrics.ready_slots.set_function(lambda: sum(not slot.waiting_for for slot in self._slots))
        self.probes: ProbeServer | None = None
        if settings.probe_port is not None:
            self.probes = ProbeServer(
                settings.probe_host,
                settings.probe_port,
                healthy=lambda: all(slot.is_alive() for slot in self._slots),
                readiness=self.readiness,
                registry=self.metrics.registry,
            )

    def run(self) -> None:
        """Work until stopped. Raises InstallationError where the engine cannot work on this machine."""
        self._publisher.start()
        for slot in self._slots:
            slot.start()
        if self.probes is not None:
            self.probes.start()
        try:
            while any(slot.is_alive() for slot in self._slots):
                with suppress(queue.Empty):
                    self._serve(self.requests.get(timeout=0.2))
        finally:
            self.stop(hurry=True)
            self._publisher.close()
            self._surroundings.scratch.close()
            if self.probes is not None:
                self.probes.close()
        for slot in self._slots:
            if slot.fatal is not None:
                raise slot.fatal

    def _serve(self, request: Request) -> None:
        match request:
            case "stop":
                self.stop()
            case "hurry":
                self.stop(hurry=True)
            case "reload":
                self.reload()

    def stop(self, *, hurry: bool = False) -> None:
        """Take no more tasks; finish those in hand within the grace period, or give them back at once."""
        self._surroundings.stop(0.0 if hurry else self._settings.grace_seconds)
        for slot in self._slots:
            slot.stop_consuming()

    def reload(self) -> None:
        """Load the engines anew beside the running ones, and swap between two tasks."""
        for slot in self._slots:
            slot.reload_requested.set()

    def readiness(self) -> Readiness:
        """Whether every slot would take a task at this moment."""
        waiting = [reason for slot in self._slots if (reason := slot.waiting_for)]
        waiting += self._surroundings.pauses()
        if self._surroundings.stopping:
            waiting.append("the end: the worker is shutting down")
        return Readiness(not waiting, tuple(waiting))


class _Slot(threading.Thread):
    """One engine process and one consumer, and the thread that serves both."""

    def __init__(self, number: int, surroundings: Surroundings, broker: BrokerSettings) -> None:
        super().__init__(name=f"slot {number}", daemon=True)
        self._surroundings = surroundings
        task_type, settings = surroundings.task_type, surroundings.settings
        self._consumer = Consumer(
            broker,
            [work_queue(task_type.name, lane) for lane in settings.lanes],
            name=f"{settings.worker_name}/{number}",
            topology=topology_for([task_type.name]),
        )
        self._lane_of = {work_queue(task_type.name, lane): lane for lane in settings.lanes}
        self._limits = MemoryLimits(settings.engine_memory_limit, settings.engine_recycle_memory)
        self._engine = EngineProcess(task_type.name, self._limits)
        self._max_tasks = settings.engine_max_tasks or math.inf
        self._successor: EngineProcess | None = None
        self._successor_limit = 0.0
        self._successor_reason: Wear | None = None
        self.reload_requested = threading.Event()
        self.fatal: InferqError | None = None
        self._engine_ready = False

    @property
    def waiting_for(self) -> str | None:
        """What keeps this slot from taking a task; None if nothing does."""
        if not self._engine_ready:
            return f"{self.name}: its engine to load"
        if not self._consumer.connected:
            return f"{self.name}: {self._consumer.last_error or 'RabbitMQ'}"
        return None

    def stop_consuming(self) -> None:
        self._consumer.stop()

    def run(self) -> None:
        try:
            self._serve()
        except (RunAborted, GracePassed):
            _log.info("%s: stopped", self.name)
        except InstallationError as error:
            self.fatal = error
            self._surroundings.stop(self._surroundings.settings.grace_seconds)
        except Exception as error:
            _log.exception("%s: ended by an error of its own", self.name)
            self.fatal = InferqError(f"{self.name} was ended by {type(error).__name__}: {error}")
            self._surroundings.stop(self._surroundings.settings.grace_seconds)
        finally:
            self._engine_ready = False
            self._consumer.close()
            self._engine.close()
            if self._successor is not None:
                self._successor.kill()

    def _serve(self) -> None:
        around = self._surroundings
        self._load_engine()
        around.patiently("object store", around.store.ping)
        around.tell(around.status.warm_up)  # where Redis is away, the patience with it runs from here
        _rehearse(around.task_type)
        self._consumer.start()
        while not around.stopping:
            if not self._engine.usable:
                self._consumer.pause()
                if self._engine.worn is not None:
                    self._replaces(self._engine.worn)
                self._load_engine()
            self._swap_engine()
            delivery = self._consumer.next(_IDLE_LOOK_SECONDS)
            if not self._engine.alive:  # it may have died while idle: that costs no task an attempt
                self._engine.kill()
            if delivery is None:
                around.look_for_redis()
                continue
            if around.stopping or not self._engine.usable:
                self._consumer.give_back(delivery)
                continue
            with around.metrics.busy_slots.track_inprogress():
                run = TaskRun(around, self._consumer, self._engine, delivery, self._lane_of[delivery.queue])
                run.complete()

    def _load_engine(self) -> None:
        """Load until it succeeds; only what can never work ends it."""
        around = self._surroundings
        self._engine_ready = False
        failures = 0
        while True:
            began = time.monotonic()
            self._engine.close()
            self._engine.spawn()
            try:
                info = self._engine.wait_ready(
                    limit=around.settings.start_limit, stopping=lambda: around.stopping
                )
                break
            except TransientFailure as error:
                failures += 1
                wait = backoff(failures)
                _log.error("%s: %s; next start in %.1f s", self.name, error, wait)
                around.sleep(wait)
        self._engine_ready = True
        around.metrics.engine_starts.inc()
        _log.info(
            "%s: %s %s on %s is ready after %.1f s",
            self.name, info.name, info.version, info.device, time.monotonic() - began,
        )  # fmt: skip

    def _swap_engine(self) -> None:
        """Start a successor where one is asked for or due, and take it where it is ready."""
        if self.reload_requested.is_set():
            self.reload_requested.clear()
            if self._successor is not None:
                self._successor.kill()
            self._start_successor(None)
        elif self._engine.tasks >= self._max_tasks and self._successor is None:
            self._start_successor("max_tasks")
        successor = self._successor
        if successor is None:
            return
        if not successor.has_answered:
            if time.monotonic() > self._successor_limit:
                self._successor = None
                self._engine.tasks = 0
                successor.kill()
                _log.error(
                    "%s: the new engine is not ready within INFERQ_START_LIMIT, the old one stays", self.name
                )
            return
        self._successor = None
        try:
            info = successor.wait_ready(limit=1)
        except (InstallationError, TransientFailure) as error:
            if self._successor_reason is not None and error.code == "out_of_memory":
                _log.info("%s: no room for a new engine beside the old one, which goes first", self.name)
                self._engine.worn = self._successor_reason
                return
            _log.error("%s: the new engine does not load, the old one stays: %s", self.name, error)
            self._engine.tasks = 0  # one that was due is tried again after as many tasks
            return
        if self._successor_reason is not None:
            self._replaces(self._successor_reason)
        old, self._engine = self._engine, successor
        self._surroundings.metrics.engine_starts.inc()
        _log.info("%s: now %s %s, model %s", self.name, info.name, info.version, info.model)
        with suppress(OSError):
            old.close()

    def _start_successor(self, reason: Wear | None) -> None:
        self._successor_reason = reason
        self._successor = EngineProcess(self._surroundings.task_type.name, self._limits)
        self._successor.spawn()
        self._successor_limit = time.monotonic() + self._surroundings.settings.start_limit

    def _replaces(self, reason: Wear) -> None:
        _log.info("%s: replaces its engine process: %s", self.name, reason)
        self._surroundings.metrics.engine_replacements.labels(reason).inc()


def _rehearse(task_type: TaskType) -> None:
    """Do what every task needs on made-up values: the first time, it takes far longer than any other."""
    name, now = task_type.name, datetime.now(UTC)
    with suppress(InvalidTask):  # which inputs a type needs is not known here
        parse_task({"task_id": "made-up", "task_type": name})
    task = Task(task_id="made-up", task_type=name, created_at=now)
    result = Result.failure(task, InvalidTask("made up"), attempts=1, finished_at=now, started_at=now)
    Event.of_result(result).model_dump_json()
    gc.freeze()  # what is loaded stays: looking through all of it for garbage would come between two tasks
