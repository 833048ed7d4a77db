"""What a worker's slots share: the services around them, and how to wait for one that is away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from broker import Publisher, backoff
from consumers.metrics import WorkerMetrics
from consumers.scratch import ScratchFolder
from consumers.settings import WorkerSettings
from schemas import Outage, TaskType
from storage import Fetcher, ObjectStore, ResultStore, StatusIndex

T = TypeVar("T")

_log = logging.getLogger(__name__)


class GracePassed(Exception):
    """The worker stops and its grace period is over: what is in hand goes back."""


@dataclass
class Surroundings:
    """The services of one worker. Safe from all its slots' threads."""

    settings: WorkerSettings
    task_type: TaskType
    store: ObjectStore
    results: ResultStore
    fetcher: Fetcher
    status: StatusIndex
    publisher: Publisher
    metrics: WorkerMetrics
    scratch: ScratchFolder
    _stopping: threading.Event = field(default_factory=threading.Event)
    _deadline: float = float("inf")
    _pauses: dict[str, str] = field(default_factory=dict)

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def grace_passed(self) -> bool:
        """Whether the time that a task in hand may still take is over."""
        return time.monotonic() >= self._deadline

    def stop(self, grace: float) -> None:
        """Begin to stop, `grace` seconds at most; a later call can only shorten it."""
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self._stopping.set()

    def pauses(self) -> list[str]:
        """Which services are waited for, and why."""
        return [f"{service}: {reason}" for service, reason in list(self._pauses.items())]

    def sleep(self, seconds: float) -> None:
        """Wait. Raises GracePassed once the grace period is over."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.grace_passed:
                raise GracePassed
            time.sleep(min(left, 0.1))
        if self.grace_passed:
            raise GracePassed

    def patiently(
        self, service: str, call: Callable[[], T], checkpoint: Callable[[], None] | None = None
    ) -> T:
        """Make a call that an outage of `service` only delays: no attempt is burnt, no result thrown away.

        Raises GracePassed where the worker has to stop before the service is back; `checkpoint` is called
        before each repetition and may raise to give up.
        """
        failures = 0
        while True:
            try:
                value = call()
            except Outage as error:
                failures += 1
                if failures == 1:
                    _log.warning("paused: %s is away: %s", service, error)
                self._pauses[service] = str(error)
                self.metrics.paused.labels(service).set(1)
                self.sleep(backoff(failures))
                if checkpoint is not None:
                    checkpoint()
                continue
            if failures:
                _log.info("resumed: %s is back", service)
                self._pauses.pop(service, None)
                self.metrics.paused.labels(service).set(0)
            return value

    def tell(self, call: Callable[[], T]) -> T | None:
        """Make a call to the status index, which is no more than an index: its outage stops nobody."""
        try:
            return call()
        except Outage as error:
            self.metrics.status_outages.inc()
            _log.debug("the status index does not know: %s", error)
            return None
