"""A slot's engine from its first start to its end, and the one task at a time that may use it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from inferq.broker import backoff
from inferq.consumers.runtime.process import EngineProcess, MemoryLimits, Wear
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import InstallationError, TransientFailure

_log = logging.getLogger(__name__)


class EngineSupervisor:
    """Who has taken the seat may use `engine`; between two tasks the engine is looked after here.

    The thread that looks after it must outlive the engine, which the kernel ends with its parent.
    """

    def __init__(self, name: str, services: WorkerServices) -> None:
        settings = services.settings
        self._name = name
        self._services = services
        self._limits = MemoryLimits(settings.engine_memory_limit, settings.engine_recycle_memory)
        self._max_tasks = settings.engine_max_tasks or math.inf
        self._taken = threading.Lock()
        self._in_hand = 0
        self._counting = threading.Lock()
        self._successor: EngineProcess | None = None
        self._successor_limit = 0.0
        self._successor_reason: Wear | None = None
        self.engine = EngineProcess(services.task_type.name, self._limits)
        self.ready = False
        self.reload_requested = threading.Event()

    @property
    def usable(self) -> bool:
        """Whether nothing is known that would keep the engine from another run."""
        return self.ready and self.engine.usable

    @property
    def shared(self) -> bool:
        """Whether more than one task is in hand."""
        return self._in_hand > 1

    @property
    def busy(self) -> bool:
        """Whether a task is in hand."""
        return self._in_hand > 0

    @contextmanager
    def task_in_hand(self) -> Iterator[None]:
        """For as long as a task is in hand, whether it has the seat or waits for it."""
        with self._counting:
            self._in_hand += 1
        try:
            yield
        finally:
            with self._counting:
                self._in_hand -= 1

    def acquire(self, timeout: float = 0) -> bool:
        """Take the seat, if it becomes free within `timeout` seconds. The engine may still not be usable."""
        if not self._taken.acquire(timeout=timeout):
            return False
        try:
            self._swap()
            if not self.engine.alive:  # it may have died while idle: that costs no task an attempt
                self.engine.kill()
        except BaseException:
            self._taken.release()
            raise
        return True

    def release(self) -> None:
        """Give the seat to whoever waits for it."""
        self._taken.release()

    def look(self) -> None:
        """Look after the engine, unless a task has it."""
        if self.acquire():
            self.release()

    def restore(self) -> None:
        """Load an engine where there is none that can be used, until it succeeds.

        Raises InstallationError where it can never work, RunAborted or GracePassed where the worker stops.
        """
        with self._taken:
            if self.engine.usable:
                return
            if self.engine.worn is not None:
                self._replaces(self.engine.worn)
            self._load()

    def close(self) -> None:
        """End the engine, and one that is loading beside it."""
        self.ready = False
        self.engine.close()
        if self._successor is not None:
            self._successor.kill()

    def _load(self) -> None:
        services = self._services
        self.ready = False
        failures = 0
        while True:
            began = time.monotonic()
            self.engine.close()
            self.engine.spawn()
            try:
                info = self.engine.wait_ready(
                    limit=services.settings.start_limit, stopping=lambda: services.stopping
                )
                break
            except TransientFailure as error:
                failures += 1
                wait = backoff(failures)
                _log.error("%s: %s; next start in %.1f s", self._name, error, wait)
                services.sleep(wait)
        self.ready = True
        services.metrics.engine_starts.inc()
        _log.info(
            "%s: %s %s on %s is ready after %.1f s",
            self._name, info.name, info.version, info.device, time.monotonic() - began,
        )  # fmt: skip

    def _swap(self) -> None:
        """Start a successor where one is asked for or due, and seat it where it is ready."""
        if self.reload_requested.is_set():
            self.reload_requested.clear()
            if self._successor is not None:
                self._successor.kill()
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
                    "%s: the new engine is not ready within INFERQ_START_LIMIT, the old one stays", self._name
                )
            return
        self._successor = None
        try:
            info = successor.wait_ready(limit=1)
        except (InstallationError, TransientFailure) as error:
            if self._successor_reason is not None and error.code == "out_of_memory":
                _log.info("%s: no room for a new engine beside the old one, which goes first", self._name)
                self.engine.worn = self._successor_reason
                return
            _log.error("%s: the new engine does not load, the old one stays: %s", self._name, error)
            self.engine.tasks = 0  # one that was due is tried again after as many tasks
            return
        if self._successor_reason is not None:
            self._replaces(self._successor_reason)
        old, self.engine = self.engine, successor
        self._services.metrics.engine_starts.inc()
        _log.info("%s: now %s %s, model %s", self._name, info.name, info.version, info.model)
        with suppress(OSError):
            old.close()

    def _start_successor(self, reason: Wear | None) -> None:
        successor = EngineProcess(self._services.task_type.name, self._limits)
        try:
            successor.spawn()
        except OSError as error:
            _log.error("%s: a new engine cannot be started, the old one stays: %s", self._name, error)
            self.engine.tasks = 0
            return
        self._successor, self._successor_reason = successor, reason
        self._successor_limit = time.monotonic() + self._services.settings.start_limit

    def _replaces(self, reason: Wear) -> None:
        _log.info("%s: replaces its engine process: %s", self._name, reason)
        self._services.metrics.engine_replacements.labels(reason).inc()


class NotStarted(Exception):
    """The run has not begun, and will not: the message says why. Another worker may have the task."""


class EngineLease:
    """One task's use of a seat's engine, which is its own from `take` to `leave`.

    `engine` and `info` are those that it had last.
    """

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self._supervisor = supervisor
        self.held = False
        self.engine = supervisor.engine
        self.info = supervisor.engine.info

    def acquire(self, timeout: float = 0) -> bool:
        """Whether the engine is the task's within `timeout` seconds. Raises NotBegun where there is none."""
        self.held = self._supervisor.acquire(timeout)
        if self.held:
            self.engine = self._supervisor.engine
            self.info = self.engine.info
        if not self._supervisor.usable:
            raise NotStarted("the engine is gone")
        return self.held

    def release(self) -> None:
        """Let another task have the engine; nothing happens where it is not this one's."""
        if self.held:
            self.held = False
            self._supervisor.release()
