"""What a worker's slots share: its services, and how to wait for one that is unavailable.

A worker waits for RabbitMQ and the object store for as long as it takes: without them no task can end. It waits
for Redis, which holds only an index, for a limited time, and then works without it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TypeVar

from inferq.broker import Publisher, backoff
from inferq.consumers.worker.lease_renewer import LeaseRenewer
from inferq.consumers.worker.loaded_engines import LoadedEngines
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.result_cache import ResultCache
from inferq.consumers.worker.scratch import ScratchFolder
from inferq.consumers.worker.settings import WorkerSettings
from inferq.consumers.worker.track_figures import TrackFigures
from inferq.schemas import Outage, TaskType
from inferq.storage import Fetcher, ObjectStore, ResultStore, StatusIndex

T = TypeVar("T")

_log = logging.getLogger(__name__)

_REDIS = "Redis"
_STORE = "object store"

STORE_LOOK_SECONDS = 60.0
"""How often an idle worker checks that the object store takes writes. Each check costs a few requests."""
_BACKGROUND_CALLS = 16
"""How many inputs and artifacts a slot transfers side by side at most."""
_ASIDE_CALLS = 4

_IDLE_LOOK_SECONDS = 10.0
"""How often an idle worker checks that Redis accepts writes: no task tells it."""


class GracePassed(Exception):
    """The worker stops and its grace period is over: the task in hand is requeued."""


@dataclass
class WorkerServices:
    """The services of a worker for one of its types. Safe from all slots' threads."""

    settings: WorkerSettings
    task_type: TaskType
    store: ObjectStore
    results: ResultStore
    fetcher: Fetcher
    status: StatusIndex
    publisher: Publisher
    metrics: WorkerMetrics
    scratch: ScratchFolder
    cache: ResultCache | None = None
    consumer_priority: int = 0
    hand_changed: threading.Event = field(default_factory=threading.Event)
    """Set whenever a slot takes a task or has ended one; the heartbeat clears it."""
    loaded_engines: LoadedEngines = field(default_factory=LoadedEngines)
    lease_renewer: LeaseRenewer = field(default_factory=LeaseRenewer)
    track_figures: TrackFigures = field(default_factory=TrackFigures)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _deadline: float = float("inf")
    _pauses: dict[str, str] = field(default_factory=dict)
    _goes_on_without_redis: bool = False
    _next_look: float = 0.0
    _next_store_look: float = 0.0
    _background: ThreadPoolExecutor = field(init=False)
    _aside: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        slots = self.settings.slots
        self._background = ThreadPoolExecutor(slots * _BACKGROUND_CALLS, thread_name_prefix="background")
        self._aside = ThreadPoolExecutor(slots * _ASIDE_CALLS, thread_name_prefix="aside")
        self.metrics.paused.labels(_REDIS).set_function(lambda: float(self.redis_patience_left > 0))
        self.metrics.without_redis.set_function(
            lambda: float(self.status.unavailable_for is not None and self.redis_patience_left == 0)
        )

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def grace_passed(self) -> bool:
        """Whether the time that a task in hand may still take is over."""
        return time.monotonic() >= self._deadline

    def stop(self, grace: float) -> None:
        """Begin to stop. Tasks in hand have `grace` seconds; a later call can only shorten that."""
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self._stopping.set()

    def pauses(self) -> list[str]:
        """The services that the worker waits for, each with the reason."""
        waiting = [f"{service}: {reason}" for service, reason in list(self._pauses.items())]
        if (left := self.redis_patience_left) > 0:
            reason = self.status.unavailable_reason
            waiting.append(f"{_REDIS}: {reason}; the worker goes on without it in {left:.0f} s")
        return waiting

    @property
    def redis_patience_left(self) -> float:
        """Seconds that the worker still waits for Redis, from when it became unavailable; 0 while it answers."""
        away = self.status.unavailable_for
        return 0.0 if away is None else max(0.0, self.settings.redis_patience - away)

    @property
    def takes_more(self) -> bool:
        """Whether a task that came now would start: the worker neither stops nor waits for Redis."""
        return not self.stopping and self.redis_patience_left == 0

    def sleep(self, seconds: float, checkpoint: Callable[[], None] | None = None) -> None:
        """Wait. Raises GracePassed once the grace period is over, and what `checkpoint` raises."""
        end = time.monotonic() + seconds
        while True:
            if self.grace_passed:
                raise GracePassed
            if checkpoint is not None:
                checkpoint()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.1))

    def unless_stopping(self) -> None:
        """A checkpoint for waits that nothing depends on. Raises GracePassed if the worker is to stop."""
        if self.stopping:
            raise GracePassed

    def retry_until_available(
        self, service: str, call: Callable[[], T], checkpoint: Callable[[], None] | None = None
    ) -> T:
        """Make a call, and repeat it while `service` is unavailable. No attempt is spent, no result is lost.

        Raises GracePassed if the worker has to stop first. `checkpoint` is called while it waits and may raise
        to give up.
        """
        failures = 0
        try:
            while True:
                try:
                    value = call()
                except Outage as error:
                    failures += 1
                    if failures == 1:
                        _log.warning("paused: waiting for %s, which is unavailable: %s", service, error)
                    self._pauses[service] = str(error)
                    self.metrics.paused.labels(service).set(1)
                    self.sleep(backoff(failures), checkpoint)
                    continue
                if failures:
                    _log.info("resumed: %s is available", service)
                return value
        finally:
            # However the call ends, nothing waits any more; the next call that has to wait says so again.
            if failures:
                self._pauses.pop(service, None)
                self.metrics.paused.labels(service).set(0)

    def in_background(self, call: Callable[[], T]) -> Future[T]:
        """Make a call on another thread, soon."""
        return self._background.submit(copy_context().run, call)

    def aside(self, call: Callable[[], T]) -> Future[T]:
        """The same for what must not wait until a download has ended."""
        return self._aside.submit(copy_context().run, call)

    def best_effort(self, call: Callable[[], T]) -> T | None:
        """Make a call to the status index without waiting for Redis; None if it is unavailable."""
        try:
            return call()
        except Outage as error:
            self.metrics.status_outages.inc()
            _log.debug("not written to the status index: %s", error)
            return None

    def call_or_skip(self, call: Callable[[], T]) -> T | None:
        """Make a call to the status index before a run; None once the worker goes on without Redis.

        Raises GracePassed if the worker is to stop while it waits: nothing has begun that would be lost.
        """
        return self._retry_while_patient(call, self.unless_stopping)

    def report_end(self, call: Callable[[], T]) -> T | None:
        """Make a call to the status index after a run: as `call_or_skip`, but skipped if the worker stops."""
        with suppress(GracePassed):
            return self._retry_while_patient(call, lambda: None)
        return None

    def look_for_redis(self) -> None:
        """Find out whether Redis can be used: now and then, and at every call while it is unavailable."""
        now = time.monotonic()
        if self.status.unavailable_for is not None or now >= self._next_look:
            self._next_look = now + _IDLE_LOOK_SECONDS
            self.best_effort(self.status.ping)

    def wait_for_store(self) -> None:
        """Wait until the object store can be used. Raises GracePassed if the worker is to stop."""
        self.retry_until_available(_STORE, self.store.ping, self.unless_stopping)
        self._next_store_look = time.monotonic() + STORE_LOOK_SECONDS

    def look_at_store(self, unsubscribe: Callable[[], None]) -> None:
        """While idle, check the object store from time to time; if it cannot be used, unsubscribe and wait.

        So a worker takes no task while it could not keep a result. Raises GracePassed.
        """
        if time.monotonic() < self._next_store_look:
            return
        self._next_store_look = time.monotonic() + STORE_LOOK_SECONDS
        try:
            self.store.ping()
        except Outage:
            unsubscribe()
            self.wait_for_store()

    def _retry_while_patient(self, call: Callable[[], T], checkpoint: Callable[[], None]) -> T | None:
        failures = 0
        while True:
            try:
                value = call()
            except Outage as error:
                failures += 1
                self.metrics.status_outages.inc()
                left = self.redis_patience_left
                if left == 0:
                    if self.status.unavailable_for is not None and not self._goes_on_without_redis:
                        self._goes_on_without_redis = True
                        _log.warning("going on without Redis until it answers: %s", error)
                    return None
                if failures == 1:
                    _log.warning(
                        "paused: waiting at most %.0f s for Redis, which is unavailable: %s", left, error
                    )
                # The index itself asks Redis at most once a second.
                self.sleep(min(backoff(failures, cap=1.0), left), checkpoint)
                continue
            if failures or self._goes_on_without_redis:
                self._goes_on_without_redis = False
                _log.info("resumed: Redis is available")
            return value
