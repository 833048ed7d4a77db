"""A slot: one engine process, and the threads that consume tasks for it."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from inferq.broker import BrokerSettings, Consumer, Delivery, topology_for, work_queue
from inferq.consumers.runtime.process import RunAborted
from inferq.consumers.worker.engine_supervisor import EngineLease, EngineState, EngineSupervisor
from inferq.consumers.worker.services import GracePassed, WorkerServices
from inferq.consumers.worker.task_group import TaskGroup
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import (
    EngineInfo,
    Event,
    InferqError,
    InstallationError,
    InvalidTask,
    Priority,
    Result,
    Task,
    TaskType,
    parse_task,
)

_log = logging.getLogger(__name__)

_IDLE_LOOK_SECONDS = 0.5
"""How long an idle thread waits for a task before it checks on its engine."""

_READY_LOOK_SECONDS = 0.1
"""How often a thread that takes tasks ahead checks whether an engine was loaded."""

_STUCK_SECONDS = 30.0
"""How far a run may be beyond its limit before its slot counts as stuck; the watchdog has acted by then."""


class Slot:
    """One engine process, one consumer, and threads that bring deliveries to their ends, each a group at a time.

    All but the first thread work only if tasks are taken ahead: because the settings say so, or because the engine
    computes several tasks together, so that a batch can form while another is computed.
    """

    def __init__(self, number: int, services: WorkerServices, broker: BrokerSettings) -> None:
        self.name = name = f"slot {number}"
        task_type, settings = services.task_type, services.settings
        lanes = {work_queue(task_type.name, lane): lane for lane in settings.lanes}
        self._consumer = consumer = Consumer(
            broker,
            list(lanes),
            name=f"{settings.worker_name}/{number}",
            topology=topology_for([task_type.name]),
            priority=services.consumer_priority,
        )
        self._supervisor = supervisor = EngineSupervisor(name, services)

        def close() -> None:
            consumer.close()
            supervisor.close()

        # The threads end together, since the engine ends with the thread that started it.
        ahead = [f"{name} ahead {n}" for n in range(1, max(settings.take_ahead, 1) + 1)]
        finished = threading.Barrier(1 + len(ahead), action=close)
        receiving = threading.Lock()
        self._threads = [
            _SlotThread(each, services, consumer, receiving, lanes, supervisor, finished, ahead=each != name)
            for each in (name, *ahead)
        ]

    @property
    def waiting_for(self) -> str | None:
        """What keeps this slot from taking a task; None if nothing does."""
        if not self._supervisor.ready:
            return f"{self.name}: the engine is loading"
        if not self._consumer.connected:
            return f"{self.name}: {self._consumer.last_error or 'RabbitMQ'}"
        return None

    @property
    def consumers(self) -> int:
        """The most consumers that it has of one lane: one for what is in hand, and one for what is taken ahead."""
        return sum(thread.works for thread in self._threads)

    @property
    def busy(self) -> bool:
        """Whether it has a task in hand."""
        return self._supervisor.busy

    @property
    def idle_seconds(self) -> float:
        """How long it has been free for a task and got none; 0 while it has one, or can take none."""
        free = self._consumer.idle_seconds
        if free is None or self.busy:
            return 0.0
        return min(free, *(time.monotonic() - thread.ended_at for thread in self._threads))

    @property
    def engine_pid(self) -> int | None:
        """The process of its engine; None if none was started."""
        return self._supervisor.engine.pid

    @property
    def loading(self) -> bool:
        """Whether it takes no task before its engine is loaded."""
        return not self._supervisor.ready

    @property
    def engine_state(self) -> EngineState:
        """Whether its engine is loaded, loads, or was unloaded."""
        return self._supervisor.state

    @property
    def disconnected(self) -> bool:
        """Whether it is disconnected and reconnecting."""
        return not self._consumer.connected and self._consumer.last_error is not None

    @property
    def engine(self) -> EngineInfo | None:
        """Its engine; None before the first one is loaded."""
        return self._supervisor.engine.info

    @property
    def in_hand(self) -> list[TaskRun]:
        """The deliveries that it has taken and not settled."""
        return [run for thread in self._threads for run in tuple(thread.in_hand)]

    @property
    def taken(self) -> Mapping[Priority, int]:
        """How many deliveries of each lane it has taken so far."""
        total: Counter[Priority] = Counter()
        for thread in self._threads:
            total.update(thread.taken)
        return total

    @property
    def requeued(self) -> Mapping[Priority, int]:
        """How many of them it has requeued."""
        total: Counter[Priority] = Counter()
        for thread in self._threads:
            total.update(thread.requeued)
        return total

    @property
    def run_seconds(self) -> float | None:
        """How long the run in progress has taken; None if there is none."""
        return self._supervisor.engine.run_seconds

    @property
    def fault(self) -> str | None:
        """Why this slot makes no progress any more; None if it does, as far as is known."""
        if not self.is_alive():
            return f"{self.name}: its thread has ended"
        if (late := self._supervisor.engine.overdue) > _STUCK_SECONDS:
            return f"{self.name}: its run is {late:.0f} s beyond its time limit"
        return None

    def watch(self) -> None:
        """Kill an engine that its own thread does not end."""
        self._supervisor.watch()

    @property
    def fatal(self) -> InferqError | None:
        """The error that ended it, if one did."""
        return next((thread.fatal for thread in self._threads if thread.fatal is not None), None)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def stop_consuming(self) -> None:
        """Take no more tasks; those in hand go on."""
        self._consumer.stop()

    def reload(self) -> None:
        """Load a new engine beside the running one, and swap between two tasks."""
        self._supervisor.reload_requested.set()


class _SlotThread(threading.Thread):
    """A thread that takes deliveries and brings them to their ends: one at a time, or a group of them.

    One thread receives at a time. While another one has deliveries in hand, it asks with a lower consumer priority,
    so that idle workers come first. A thread that is `ahead` asks only then. `works`: whether it takes any tasks.
    """

    def __init__(
        self,
        name: str,
        services: WorkerServices,
        consumer: Consumer,
        receiving: threading.Lock,
        lanes: Mapping[str, Priority],
        supervisor: EngineSupervisor,
        finished: threading.Barrier,
        *,
        ahead: bool,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._services = services
        self._supervisor = supervisor
        self._finished = finished
        self._ahead = ahead
        self._consumer = consumer
        self._receiving = receiving
        self._lane_of = lanes
        self.fatal: InferqError | None = None
        self.works = not ahead
        self._group = 1
        self.in_hand: list[TaskRun] = []
        self.taken = Counter[Priority]()
        self.requeued = Counter[Priority]()
        self.ended_at = float("-inf")

    def run(self) -> None:
        try:
            self._serve()
        except (RunAborted, GracePassed):
            _log.info("%s: stopped", self.name)
        except InstallationError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("%s: ended by an unexpected error", self.name)
            self._fail(InferqError(f"{self.name} was ended by {type(error).__name__}: {error}"))
        finally:
            self._finished.wait()

    def _fail(self, error: InferqError) -> None:
        """End the whole worker for an error of this thread."""
        self.fatal = error
        self._services.stop(self._services.settings.grace_seconds)

    def _serve(self) -> None:
        services = self._services
        if not self._ahead:
            self._consumer.start()  # it connects while the engine loads, and takes no task before `next_group`
            _warm_up(services.task_type)
        if self._ahead:
            while self._supervisor.engine.info is None:  # how many tasks it computes together is not known
                if services.stopping:
                    return
                services.sleep(_READY_LOOK_SECONDS)
            if not (services.settings.take_ahead or self._supervisor.group_size > 1):
                return
            self._supervisor.clock.join()
            self.works = True
        else:
            self._supervisor.restore()
        services.wait_for_store()
        services.best_effort(services.status.warm_up)  # an unavailable Redis is waited for from here on
        if not self._ahead:
            self._use_window()
        while not services.stopping:
            if not self._supervisor.usable:
                self._consumer.pause()
                self._supervisor.restore()
            if not self._ahead and self._supervisor.group_size > self._group:
                with self._receiving:  # the engine was loaded for a task, and takes more together
                    self._consumer.pause()
                    self._use_window()
            deliveries = self._next_deliveries()
            if deliveries:
                self._complete(deliveries)
            else:
                self._supervisor.look()
                services.look_for_redis()
                if not self._ahead:  # the other threads would go on taking tasks
                    services.look_at_store(self._consumer.pause)

    def _use_window(self) -> None:
        """Have as many deliveries in hand as the engine computes together, and as many ahead."""
        self._group = size = self._supervisor.group_size
        ahead = max(self._services.settings.take_ahead, int(size > 1))
        self._consumer.use_window(size, size * (1 + ahead))

    def _next_deliveries(self) -> list[Delivery]:
        supervisor = self._supervisor
        if self._ahead and not supervisor.wait_busy(_IDLE_LOOK_SECONDS):
            return []
        if not self._receiving.acquire(timeout=_IDLE_LOOK_SECONDS):
            return []
        try:
            return self._consumer.next_group(
                _IDLE_LOOK_SECONDS, most=supervisor.group_size, wait=0, low_priority=supervisor.busy
            )
        finally:
            self._receiving.release()

    def _complete(self, deliveries: list[Delivery]) -> None:
        if self._services.stopping:
            self._consumer.requeue_all(deliveries)
            return
        with self._supervisor.lease() as lease:
            runs = self._take(lease, deliveries)
            self._services.hand_changed.set()
            if len(runs) == 1 and (lease.group_size == 1 or not lease.shared):
                runs[0].complete()
            else:
                TaskGroup(self._services, self._consumer, lease, runs, partial(self._more, lease)).complete()
        for run in self.in_hand:
            if run.outcome == "given_back":
                self.requeued[run.lane] += 1
        self.in_hand = []
        self.ended_at = time.monotonic()
        self._services.hand_changed.set()

    def _more(self, lease: EngineLease, most: int) -> list[TaskRun]:
        """What has arrived since, at most so many."""
        if not self._receiving.acquire(blocking=False):
            return []
        try:
            deliveries = self._consumer.next_group(0, most=most, wait=0, low_priority=True)
        finally:
            self._receiving.release()
        return self._take(lease, deliveries)

    def _take(self, lease: EngineLease, deliveries: list[Delivery]) -> list[TaskRun]:
        runs = [
            TaskRun(self._services, self._consumer, lease, delivery, self._lane_of[delivery.queue])
            for delivery in deliveries
        ]
        self.in_hand += runs
        for run in runs:
            self.taken[run.lane] += 1
            run.take(run.read)  # so that a heartbeat names the task
        return runs


def _warm_up(task_type: TaskType) -> None:
    """Do everything that each task needs once, on made-up values: the first time takes far longer."""
    name, now = task_type.name, datetime.now(UTC)
    with suppress(InvalidTask):  # which inputs a type needs is not known here
        parse_task({"task_id": "made-up", "task_type": name})
    task = Task(task_id="made-up", task_type=name, created_at=now)
    result = Result.failure(task, InvalidTask("made up"), attempts=1, finished_at=now, started_at=now)
    Event.of_result(result).model_dump_json()
    gc.freeze()  # what is loaded stays; collecting it for nothing would come between two tasks
