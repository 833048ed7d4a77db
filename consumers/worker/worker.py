"""The worker: one light process that takes tasks one at a time per slot and has them computed.

The life of a delivery: parse → ended, cancelled or expired already? → fetch the inputs into a scratch
folder → run in the slot's engine process → upload the artifacts → write `result.json` once → status → ack.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from inferq.broker import BrokerSettings, Consumer, Delivery, Publisher, topology_for, work_queue
from inferq.consumers.probes.server import ProbeServer, Readiness
from inferq.consumers.runtime.device_memory import DeviceMemory
from inferq.consumers.runtime.process import RunAborted
from inferq.consumers.worker.engine_supervisor import EngineSupervisor
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.result_cache import ResultCache
from inferq.consumers.worker.scratch import ScratchFolder
from inferq.consumers.worker.services import GracePassed, WorkerServices
from inferq.consumers.worker.settings import WorkerSettings
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import (
    Event,
    InferqError,
    InstallationError,
    InvalidTask,
    Result,
    Task,
    TaskType,
    parse_task,
)
from inferq.storage import Fetcher, ResultStore, StatusIndex, StorageSettings, open_store

_log = logging.getLogger(__name__)

Request = Literal["stop", "hurry", "reload"]

_IDLE_LOOK_SECONDS = 0.5
"""How long an idle slot waits for a task before it looks after its engine."""

_READY_LOOK_SECONDS = 0.1
"""How often a hand that takes tasks ahead looks whether the first engine is ready."""


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
        self._services = WorkerServices(
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
        self._slots = [_Slot(number, self._services, broker) for number in range(settings.slots)]
        self.metrics.busy_slots.set_function(lambda: sum(slot.busy for slot in self._slots))
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
            self._services.scratch.close()
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
        self._services.stop(0.0 if hurry else self._settings.grace_seconds)
        for slot in self._slots:
            slot.stop_consuming()

    def reload(self) -> None:
        """Load the engines anew beside the running ones, and swap between two tasks."""
        for slot in self._slots:
            slot.reload()

    def readiness(self) -> Readiness:
        """Whether every slot would take a task at this moment."""
        waiting = [reason for slot in self._slots if (reason := slot.waiting_for)]
        waiting += self._services.pauses()
        if self._services.stopping:
            waiting.append("the end: the worker is shutting down")
        return Readiness(not waiting, tuple(waiting))


class _Slot:
    """One engine process, and the hands that bring tasks to it: a second one where tasks are taken ahead."""

    def __init__(self, number: int, services: WorkerServices, broker: BrokerSettings) -> None:
        name = f"slot {number}"
        supervisor = EngineSupervisor(name, services)
        self._supervisor = supervisor
        names = [name, f"{name} ahead"] if services.settings.take_ahead else [name]
        over = threading.Barrier(len(names), action=supervisor.close)
        self._threads = [
            _SlotThread(each, services, broker, supervisor, over, ahead=each != name) for each in names
        ]

    @property
    def waiting_for(self) -> str | None:
        """What keeps this slot from taking a task; None if nothing does."""
        first = self._threads[0]
        if not self._supervisor.ready:
            return f"{first.name}: its engine to load"
        return next((reason for thread in self._threads if (reason := thread.waiting_for)), None)

    @property
    def busy(self) -> bool:
        """Whether it has a task in hand."""
        return self._supervisor.busy

    @property
    def fatal(self) -> InferqError | None:
        """What ended it, where that was an error."""
        return next((thread.fatal for thread in self._threads if thread.fatal is not None), None)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def stop_consuming(self) -> None:
        for thread in self._threads:
            thread.stop_consuming()

    def reload(self) -> None:
        self._supervisor.reload_requested.set()


class _SlotThread(threading.Thread):
    """One consumer, and the thread that brings what it delivers to the engine, one task at a time.

    A hand that is `ahead`, and the other one while that has a task, gets a task only where no slot is idle.
    All hands of a slot end together, once each is `over`: the engine ends with the thread that started it.
    """

    def __init__(
        self,
        name: str,
        services: WorkerServices,
        broker: BrokerSettings,
        supervisor: EngineSupervisor,
        over: threading.Barrier,
        *,
        ahead: bool,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._services = services
        self._supervisor = supervisor
        self._ahead = ahead
        task_type, settings = services.task_type, services.settings
        self._lane_of = {work_queue(task_type.name, lane): lane for lane in settings.lanes}
        self._consumer = Consumer(
            broker,
            list(self._lane_of),
            name=f"{settings.worker_name}/{name.removeprefix('slot ')}",
            topology=topology_for([task_type.name]),
            low_priority=ahead,
        )
        self._over = over
        self.fatal: InferqError | None = None

    @property
    def waiting_for(self) -> str | None:
        """What keeps it from taking a task; None if nothing does."""
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
            self._services.stop(self._services.settings.grace_seconds)
        except Exception as error:
            _log.exception("%s: ended by an error of its own", self.name)
            self.fatal = InferqError(f"{self.name} was ended by {type(error).__name__}: {error}")
            self._services.stop(self._services.settings.grace_seconds)
        finally:
            self._consumer.close()
            self._over.wait()

    def _serve(self) -> None:
        services = self._services
        if self._ahead:
            while not self._supervisor.ready:
                if services.stopping:
                    return
                services.sleep(_READY_LOOK_SECONDS)
        else:
            self._supervisor.restore()
        services.retry_until_available("object store", services.store.ping, services.unless_stopping)
        services.best_effort(
            services.status.warm_up
        )  # where Redis is away, the patience with it runs from here
        _rehearse(services.task_type)
        self._consumer.start()
        while not services.stopping:
            if not self._supervisor.usable:
                self._consumer.pause()
                self._supervisor.restore()
            delivery = self._consumer.next(_IDLE_LOOK_SECONDS, low_priority=self._supervisor.busy)
            if delivery is not None:
                self._bring(delivery)
            else:
                self._supervisor.look()
                services.look_for_redis()

    def _bring(self, delivery: Delivery) -> None:
        services = self._services
        if services.stopping:
            self._consumer.requeue(delivery)
            return
        with self._supervisor.task_in_hand():
            TaskRun(
                services, self._consumer, self._supervisor, delivery, self._lane_of[delivery.queue]
            ).complete()


def _rehearse(task_type: TaskType) -> None:
    """Do what every task needs on made-up values: the first time, it takes far longer than any other."""
    name, now = task_type.name, datetime.now(UTC)
    with suppress(InvalidTask):  # which inputs a type needs is not known here
        parse_task({"task_id": "made-up", "task_type": name})
    task = Task(task_id="made-up", task_type=name, created_at=now)
    result = Result.failure(task, InvalidTask("made up"), attempts=1, finished_at=now, started_at=now)
    Event.of_result(result).model_dump_json()
    gc.freeze()  # what is loaded stays: looking through all of it for garbage would come between two tasks
