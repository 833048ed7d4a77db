"""A slot's engine process from its first start to its end, and the leases by which one task at a time holds it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal

from inferq.broker import backoff
from inferq.consumers.runtime.memory import MemoryLimits
from inferq.consumers.runtime.process import EngineProcess, Wear
from inferq.consumers.runtime.runs import LOOK_SECONDS, RunAborted
from inferq.consumers.worker.batch_limit import BatchLimit
from inferq.consumers.worker.engine_clock import Step
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.waiting_line import Place, WaitingLine
from inferq.schemas import EngineInfo, InstallationError, TransientFailure

_log = logging.getLogger(__name__)

_WATCHDOG_SECONDS = 10.0
"""How far a run may be beyond its time limit and `abort_grace` before the watchdog kills the engine."""

_LOAD_LOOK_SECONDS = 0.01
"""How often a task that waits for its engine to load checks whether it is loaded."""

EngineState = Literal["unloaded", "loading", "loaded"]
"""Whether there is an engine process, and whether it has loaded. A loaded one may have ended since."""

Unload = Literal["idle", "room", "reload", "max_tasks"]
"""Why a loaded engine is unloaded: it has no task, another one needs the room, or it is to be loaded anew."""

_CLOSE_SECONDS = 5.0
"""How long an engine has to close itself."""
_ROOM_SECONDS = 1.0
"""How long it has if another engine's task waits for that."""


class NotStarted(Exception):
    """The run has not started and will not start here; the message says why. Another worker may run the task."""


class BatchEndedEngine(NotStarted):
    """The engine ended while it computed the task together with others: any of them may be the cause."""


class EngineSupervisor:
    """Owns a slot's engine process. One task holds it at a time; between tasks it is restarted or replaced.

    The engine loads before the first task, or, with INFERQ_LOAD=lazy or after it was unloaded, for the task that
    needs it. Of the worker's engines, only so many are loaded as `LoadedEngines` allows. Every thread that calls
    `restore`, `look` or `acquire` must outlive the engine: the kernel ends it together with the thread that started it.
    """

    def __init__(self, name: str, services: WorkerServices) -> None:
        settings = services.settings
        self._name = name
        self._services = services
        self._limits = MemoryLimits(settings.engine_memory_limit, settings.engine_recycle_memory)
        self._max_tasks = settings.engine_max_tasks or math.inf
        self._line = WaitingLine()
        self._successor: EngineProcess | None = None
        self._successor_limit = 0.0
        self._successor_reason: Wear | None = None
        self._batches = BatchLimit()
        self.engine = self._new_engine()
        self.clock = services.metrics.add_engine(services.task_type.name)
        self.state: EngineState = "unloaded"
        self._room = services.loaded_engines.add(self.make_room)
        self._limited = services.loaded_engines.limited
        self.ready = settings.engine_load == "lazy" or self._limited
        """Whether the slot may take tasks: the engine is loaded, or loads for the next task."""
        self.reload_requested = threading.Event()
        self._idle_unload = settings.idle_unload or math.inf
        self._load_began = 0.0
        self._load_error: InstallationError | None = None

    @property
    def usable(self) -> bool:
        """Whether the engine can take another run, or can load for one, as far as is known."""
        return self.ready and (self.state != "loaded" or self.engine.usable)

    @property
    def tasks_in_hand(self) -> int:
        """How many tasks hold the engine or may still ask for it."""
        return len(self._line)

    @property
    def busy(self) -> bool:
        """Whether a task is in hand."""
        return self.tasks_in_hand > 0

    @property
    def group_size(self) -> int:
        """The most tasks that the engine computes together now: its own limit, the settings', and memory's."""
        wanted = self._services.settings.batch_size
        own = self.engine.batch_size
        return self._batches.within(own if wanted is None else min(own, wanted))

    def note_batches(self, sizes: Mapping[int, int], *, exhausted: int = 0) -> None:
        """How many tasks were computed in batches of each size, and for how many together memory ran out."""
        limit = self.group_size
        for size, tasks in sizes.items():
            self._batches.worked(size)
            self._services.metrics.batches(
                self._services.task_type.name, size, math.ceil(tasks / size), limit
            )
        if exhausted:
            self._batches.shrink(min(limit, exhausted))
            _log.warning(
                "%s: out of memory in a batch; at most %d tasks together now", self._name, self.group_size
            )

    def note_single(self) -> None:
        """A task was computed by itself: with batches of one, memory may suffice for more again."""
        self._batches.worked(1)

    def wait_busy(self, timeout: float) -> bool:
        """Wait, at most `timeout` seconds, until a task is in hand."""
        return self._line.wait_occupied(timeout)

    @contextmanager
    def lease(self) -> Iterator[EngineLease]:
        """The claim of a task that has just come in hand. Claims are served in the order of their making."""
        with self._line.enter() as place:
            lease = EngineLease(self, place)
            try:
                yield lease
            finally:
                lease.release()
                self.clock.move(lease.step, "task")
                self.note_used()

    def note_used(self) -> None:
        """The engine is not idle now, and a task in hand may be followed by the next one."""
        self._room.used_at = time.monotonic()

    def look(self) -> None:
        """Replace or unload the engine if that is due, unless a task holds it or waits for it."""
        with self._line.hold_if_idle() as held:
            if not held:
                return
            match self.state:
                case "unloaded":
                    self.reload_requested.clear()  # the next load takes the new weights
                case "loading":
                    self._load_within(0)
                case "loaded":
                    idle = not self.busy and time.monotonic() - self._room.used_at >= self._idle_unload
                    reason = "idle" if idle else self._unload_reason()
                    if reason is not None:
                        self._unload(reason)
                    else:
                        self._keep()

    def prepare_for_run(self, timeout: float = 0) -> bool:
        """Load the engine if it is unloaded, or see to the one that is loaded. The task that holds it calls this.

        Gives whether it is loaded within `timeout` seconds.
        """
        if self.state == "loaded" and (reason := self._unload_reason()) is not None:
            self._unload(reason)
        if self.state != "loaded":
            return self._load_within(timeout)
        self._keep()
        return True

    def make_room(self) -> bool:
        """Unload the engine, unless a task holds it or waits for it; gives whether that was done. For any thread."""
        with self._line.hold_if_idle() as held:
            if not held or self.state != "loaded":
                return False
            self._unload("room", _ROOM_SECONDS)
            return True

    def withdraw(self) -> None:
        """Ask no more for an engine that is not loaded, unless a task waits for it."""
        if self._limited and self._line.idle:
            self._room.withdraw()

    def restore(self) -> None:
        """Load an engine if there is no usable one, and retry until it loads.

        Raises InstallationError if it can never load here, RunAborted or GracePassed if the worker stops.
        """
        with self._line.hold_first():
            if self._load_error is not None:
                raise self._load_error
            if self.usable:
                return
            if self.engine.worn is not None:
                self._count_replacement(self.engine.worn)
            self._load()

    def watch(self) -> None:
        """Kill the engine if its run is long beyond its limit. For a thread that waits for nothing."""
        engine = self.engine
        if (late := engine.overdue) > _WATCHDOG_SECONDS:
            _log.error(
                "%s: killing the engine process: its run is %.0f s beyond its time limit, and the thread that "
                "should end it does not", self._name, late,
            )  # fmt: skip
            engine.kill_overdue()

    def close(self) -> None:
        """End the engine, and a successor that is loading."""
        self.ready = False
        self.clock.load(False)
        if self.state == "loading":
            self.engine.kill()  # it would not notice soon that its pipe is closed
        self.engine.close()
        self._room.leave()
        self._room.withdraw()
        self._drop_successor()

    def _load(self) -> None:
        services = self._services
        self.ready, self.state = False, "unloaded"
        self.clock.load(False)
        self._drop_successor()  # two engines may not fit into the GPU's memory
        failures = 0
        while True:
            while not self._room.ask(LOOK_SECONDS):
                if services.stopping:
                    raise RunAborted("shutdown")
            self._start()
            try:
                info = self.engine.wait_ready(
                    limit=services.settings.start_limit, stopping=lambda: services.stopping
                )
                break
            except TransientFailure as error:
                self._room.leave()
                failures += 1
                wait = backoff(failures)
                _log.error("%s: %s; next start in %.1f s", self._name, error, wait)
                services.sleep(wait)
        self._note_loaded(info)

    def _load_within(self, seconds: float) -> bool:
        """Whether the engine, which loads for a task, is loaded within `seconds`.

        If it cannot load, the slot takes no task until `restore` has loaded it.
        """
        limit = self._services.settings.start_limit
        deadline = time.monotonic() + seconds
        if not self.ready:
            return False
        try:
            if self.state == "unloaded":
                if not self._room.ask(seconds):
                    return False
                self.reload_requested.clear()
                self._start()
                self.state = "loading"
            while not self.engine.has_answered:
                if time.monotonic() - self._load_began > limit:
                    raise TransientFailure(
                        f"the engine was not ready within {limit:g} s; if it needs longer, raise INFERQ_START_LIMIT",
                        code="engine_slow_start",
                    )
                if (left := deadline - time.monotonic()) <= 0:
                    return False
                time.sleep(min(left, _LOAD_LOOK_SECONDS))
            self._note_loaded(self.engine.wait_ready(limit=1))
        except InstallationError as error:
            self._load_error = error
        except (TransientFailure, OSError) as error:
            _log.error("%s: %s", self._name, error)
        else:
            return True
        self.ready, self.state = False, "unloaded"
        self.engine.kill()
        self._room.leave()
        return False

    def _start(self) -> None:
        self._load_began = time.monotonic()
        self.engine.close()
        self.engine.spawn()

    def _note_loaded(self, info: EngineInfo) -> None:
        self.ready, self.state = True, "loaded"
        seconds = time.monotonic() - self._load_began
        self._room.note_loaded(seconds)
        self.clock.load(True)
        self._services.metrics.engine_starts.inc()
        _log.info(
            "%s: %s %s on %s is ready after %.1f s",
            self._name, info.name, info.version, info.device, seconds,
        )  # fmt: skip

    def _keep(self) -> None:
        """Swap in a successor that is ready, and notice an engine that died while idle."""
        self._swap()
        if not self.engine.alive:  # that costs no task an attempt
            self.engine.kill()
            self.clock.load(False)

    def _unload_reason(self) -> Unload | None:
        """Why to unload the engine before its next task, where two may not be loaded side by side."""
        if not self._limited:
            return None
        if self._room.must_yield():
            return "room"
        if self.reload_requested.is_set():
            return "reload"
        return "max_tasks" if self.engine.tasks >= self._max_tasks else None

    def _unload(self, reason: Unload, seconds: float = _CLOSE_SECONDS) -> None:
        """End the engine process; the next task loads the engine again."""
        _log.info("%s: unloading the engine: %s", self._name, reason)
        self.state = "unloaded"
        self.clock.load(False)
        self._services.metrics.engine_unloads.labels(reason).inc()
        self._drop_successor()
        try:
            self.engine.close(seconds)
        finally:
            self._room.leave()

    def _swap(self) -> None:
        """Start a successor if one is requested or due, and replace the engine by it once it is ready."""
        if self.reload_requested.is_set():
            self.reload_requested.clear()
            self._drop_successor()
            self._start_successor(None)
        elif self.engine.tasks >= self._max_tasks and self._successor is None:
            self._start_successor("max_tasks")
        successor = self._successor
        if successor is None:
            return
        if not successor.has_answered:
            if time.monotonic() > self._successor_limit:
                self._successor = None
                self.engine.tasks = 0
                successor.kill()
                _log.error(
                    "%s: the new engine is not ready within INFERQ_START_LIMIT; keeping the old one",
                    self._name,
                )
            return
        self._successor = None
        try:
            info = successor.wait_ready(limit=1)
        except (InstallationError, TransientFailure) as error:
            if self._successor_reason is not None and error.code == "out_of_memory":
                _log.info("%s: no memory for a second engine; ending the old one first", self._name)
                self.engine.worn = self._successor_reason
                return
            _log.error("%s: the new engine does not load; keeping the old one: %s", self._name, error)
            self.engine.tasks = 0  # a replacement that was due is tried again after as many tasks
            return
        if self._successor_reason is not None:
            self._count_replacement(self._successor_reason)
        old, self.engine = self.engine, successor
        self.clock.load(True)  # the old one may have ended in its last run
        self._services.metrics.engine_starts.inc()
        _log.info("%s: now %s %s, model %s", self._name, info.name, info.version, info.model)
        with suppress(OSError):
            old.close()

    def _drop_successor(self) -> None:
        if self._successor is not None:
            self._successor.kill()
            self._successor = None

    def _start_successor(self, reason: Wear | None) -> None:
        successor = self._new_engine()
        try:
            successor.spawn()
        except OSError as error:
            _log.error("%s: a new engine cannot be started; keeping the old one: %s", self._name, error)
            self.engine.tasks = 0
            return
        self._successor, self._successor_reason = successor, reason
        self._successor_limit = time.monotonic() + self._services.settings.start_limit

    def _new_engine(self) -> EngineProcess:
        services = self._services
        dropped = services.metrics.engine_lines_dropped.inc
        return EngineProcess(services.task_type.name, self._limits, lines_dropped=dropped)

    def _count_replacement(self, reason: Wear) -> None:
        _log.info("%s: replacing the engine process: %s", self._name, reason)
        self._services.metrics.engine_replacements.labels(reason).inc()


class EngineLease:
    """One task's claim to a slot's engine: it waits for the engine, holds it for a run, and releases it.

    `engine` and `info` are those that it held last. `step` is where the task is, for the engine's clock.
    """

    def __init__(self, supervisor: EngineSupervisor, place: Place) -> None:
        self._supervisor = supervisor
        self._place = place
        self.engine = supervisor.engine
        self.info = supervisor.engine.info
        self.step: Step = "task"
        self._turn_to("input")

    @property
    def held(self) -> bool:
        """Whether the engine is this task's now, and loaded."""
        return self._place.holds and self._supervisor.state == "loaded"

    @property
    def usable(self) -> bool:
        """Whether the engine can take another run, or can load for one, as far as is known."""
        return self._supervisor.usable

    @property
    def shared(self) -> bool:
        """Whether another task is in hand besides this one."""
        return self._supervisor.tasks_in_hand > 1

    def acquire(self, timeout: float = 0, *, alone: bool = False) -> bool:
        """Whether the engine is the task's, and loaded, within `timeout` seconds.

        An unloaded engine begins to load. Raises NotStarted if the engine cannot run, or cannot load. With `alone`, no
        other task of the slot is begun and unfinished then: if the worker ends, it was this one.
        """
        deadline = time.monotonic() + timeout
        if self._place.acquire(timeout, alone=alone):
            try:
                self._supervisor.prepare_for_run(max(0.0, deadline - time.monotonic()))
            except BaseException:
                self._place.release()
                raise
            self.engine = self._supervisor.engine
            self.info = self.engine.info
        if not self._supervisor.usable:
            raise NotStarted("the engine is not usable")
        return self.held

    def step_aside(self) -> None:
        """Let later tasks use the engine, until `acquire` is called again: the place in line stays."""
        self._place.release()
        self._place.finish()  # the engine was at most loading for it
        self._supervisor.withdraw()

    def release(self) -> None:
        """Let another task use the engine, if it is held: this one needs it no more."""
        self._place.release()
        self._supervisor.withdraw()
        self._turn_to("result")

    def finish(self) -> None:
        """What was computed has come to its end."""
        self._place.finish()

    @property
    def group_size(self) -> int:
        """The most tasks that the engine computes together now."""
        return self._supervisor.group_size

    def note_batches(self, sizes: Mapping[int, int], *, exhausted: int = 0) -> None:
        """How many tasks were computed in batches of each size, and for how many together memory ran out."""
        self._supervisor.note_batches(sizes, exhausted=exhausted)

    @contextmanager
    def computing(self, tasks: int = 1) -> Iterator[None]:
        """For the time in which the engine computes the task, or several."""
        self._turn_to("computing")
        try:
            yield
            if tasks == 1:
                self._supervisor.note_single()
        finally:
            self._supervisor.note_used()
            if not self.engine.usable:
                self._supervisor.clock.load(False)
            self._turn_to("result")

    def _turn_to(self, step: Step) -> None:
        if step != self.step:
            self._supervisor.clock.move(self.step, step)
            self.step = step
