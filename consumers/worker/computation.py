"""Fetching a task's inputs and computing it, or answering it from the result cache; and when to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from inferq.broker import Consumer, Delivery
from inferq.consumers.runtime.messages import Done, Failed, FileRef, Job
from inferq.consumers.runtime.process import LOOK_SECONDS, AbortReason, RunAborted, RunHooks
from inferq.consumers.worker.engine_supervisor import EngineLease, NotStarted
from inferq.consumers.worker.inputs import Inputs, fetch_inputs
from inferq.consumers.worker.notifier import Notifier
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import Task, tracing
from inferq.schemas.tracing import Span
from inferq.storage import CommandGroup


class Computation:
    """The computing of one task. `run` names the run in the status index. `scratch` is the folder for its files,
    which is made once it is needed.

    `cache_key` is the task's key in the result cache, if its result can be reused. `cached` says whether the
    answer came from there. `running`: whether the run has started, with or without a lease. `engine_seconds`: how
    long the engine computed, also if that failed or was stopped.
    """

    def __init__(
        self,
        services: WorkerServices,
        consumer: Consumer,
        engine_lease: EngineLease,
        delivery: Delivery,
        task: Task,
        *,
        run: str,
        scratch: str,
        notifier: Notifier,
    ) -> None:
        self._services = services
        self._consumer = consumer
        self._engine_lease = engine_lease
        self._delivery = delivery
        self._task = task
        self._run = run
        self._scratch = scratch
        self._notifier = notifier
        self._held = True
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._renewed_at = time.monotonic()
        self._renewing = threading.Lock()
        self._renews = False
        self.running = False
        self.cache_key: str | None = None
        self.cached = False
        self._found: Done | None = None
        self._looked_up = False
        self.engine_seconds = 0.0

    def fetch(self) -> Inputs:
        """Fetch the inputs. Raises InvalidTask, TransientFailure, and what `checkpoint` raises."""
        with tracing.span("fetch"):
            return fetch_inputs(self._services, self._task, Path(self._scratch), self.checkpoint)

    def fetch_early(self) -> Future[Inputs]:
        """Fetch the inputs before they are sure to be needed; an error counts only once they are."""
        fetched: Future[Inputs] = Future()
        try:
            fetched.set_result(self.fetch())
        except Exception as error:
            fetched.set_exception(error)
        return fetched

    def answer(self, inputs: dict[str, FileRef]) -> Done | Failed:
        """What the result cache has, or else what the engine computes.

        Raises EngineDied and OverTime, RunAborted if the run has to stop, and NotStarted as `checkpoint`.
        """
        with tracing.span("inference") as span:
            answer = self.from_cache(inputs) or self._compute(inputs)
            self._note_answer(span, answer)
            return answer

    def abort_reason(self) -> AbortReason | None:
        """Why the run has to stop; None if it may go on. Renews the run's lease."""
        if self._services.grace_passed:
            return "shutdown"
        self._notice_lost_message()
        with self._renewing:
            return "cancelled" if self._cancel_requested() else None

    def ask_cancelled(self, group: CommandGroup) -> Callable[[], bool]:
        """The same without waiting: once the group is sent, calling the result says whether it is cancelled."""
        self._notice_lost_message()
        self._renewed_at = time.monotonic()
        reply = self._ask_cancelled(group)
        return lambda: bool(self._services.best_effort(reply))

    def _notice_lost_message(self) -> None:
        if self._held and not self._consumer.holds(self._delivery):
            # RabbitMQ delivers it again while this run goes on: a lost connection is not a lost run.
            self._held = False
            self.release_run(keep_lease=True)

    def checkpoint(self) -> None:
        """For the waits before the engine computes: `require_message`, and raise RunAborted if the run has to stop."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        self.require_message()
        reason = self.abort_reason()
        if reason is not None:
            raise RunAborted(reason)

    def require_message(self) -> None:
        """Raise NotStarted if RabbitMQ delivers the message again.

        Before the engine computes, another worker loses nothing by starting over. This one may wait for long, for a
        fault that only its machine has.
        """
        if not self._consumer.holds(self._delivery):
            raise NotStarted("its connection was lost")

    def start_renewing(self) -> None:
        """From now on, the lease is also renewed while the run's thread is in a blocking call."""
        self._renews = True
        self._renewed_at = time.monotonic()
        self._services.lease_renewer.add(self._run, self._renew)

    def stop_renewing(self) -> None:
        """Let the lease end."""
        self._services.lease_renewer.remove(self._run)
        with self._renewing:
            self._renews = False

    def _renew(self) -> None:
        with self._renewing:
            if self._renews and time.monotonic() - self._renewed_at >= LOOK_SECONDS:
                self._cancel_requested()

    def _cancel_requested(self) -> bool:
        self._renewed_at = time.monotonic()
        return bool(self._services.best_effort(lambda: self._ask_cancelled(None)()))

    def _ask_cancelled(self, group: CommandGroup | None) -> Callable[[], bool]:
        task = self._task
        return self._services.status.cancel_requested_pipelined(
            task.tenant,
            task.task_id,
            task.batch_id,
            task.batch_line,
            run=self._run,
            running=self.running,
            group=group,
        )

    def release_run(self, *, keep_lease: bool = False, keep_run: bool = False) -> None:
        """Say that this run is not orphaned, now that another worker may get the task.

        Its lease ends, unless `keep_lease`: the run itself continues. With `keep_run`, the task may have ended its
        engine, and shares no batch from now on.
        """
        released = partial(
            self._services.status.released,
            self._task,
            attempt=self._delivery.attempt,
            redrives=self._delivery.redrives,
            run=self._run,
            keep_lease=keep_lease,
            keep_run=keep_run,
        )
        self._services.best_effort(released)

    def from_cache(self, inputs: dict[str, FileRef]) -> Done | None:
        """The answer of the result cache; None if it has none."""
        if not self._looked_up and (self.cached or self._key(inputs) is not None):
            self._looked_up = True
            found = self.cached or self.find()
            self._services.metrics.looked_up(self._task.task_type, "hit" if found else "miss")
        return self._found

    def find(self) -> bool:
        """Whether the result cache has the answer now, by the `cache_key`."""
        cache, key = self._services.cache, self.cache_key
        if cache is None or key is None:
            return False
        find = partial(cache.find, self._task.tenant, key, Path(self._scratch))
        self._found = self._services.retry_until_available("object store", find, self.checkpoint)
        self.cached = self._found is not None
        return self.cached

    def work(self, fetched: Future[Inputs] | None) -> str | None:
        """What the run is to compute, by the `cache_key`; None if the cache has answered it, or never can."""
        if self.cached or (fetched is None and self._task.inputs()):
            return None
        return self._key({} if fetched is None else fetched.result().files)

    @property
    def may_be_cached(self) -> bool:
        """Whether the result cache is on and may have the answer."""
        return self._services.cache is not None and self._services.cache.may_have(self._task)

    def _key(self, inputs: dict[str, FileRef]) -> str | None:
        cache, engine = self._services.cache, self._engine_lease.info
        self.cache_key = None if cache is None or engine is None else cache.key(self._task, inputs, engine)
        return self.cache_key

    def _compute(self, inputs: dict[str, FileRef]) -> Done | Failed:
        services = self._services
        began = time.monotonic()
        try:
            with self._engine_lease.computing():
                return self._engine_lease.engine.run(
                    self._delivery.body.decode(),
                    self._scratch,
                    inputs,
                    watch=RunHooks(self.progress, self.abort_reason),
                    time_limit=self.time_limit,
                    abort_grace=services.settings.abort_grace,
                )
        finally:
            self.computed(time.monotonic() - began)

    def job(self, inputs: dict[str, FileRef]) -> Job:
        """The task for an engine process that computes it together with others."""
        return Job(self._delivery.body.decode(), self._scratch, inputs, self.time_limit)

    def computed(self, seconds: float) -> None:
        """The engine computed for so long; in a batch, this is the task's share."""
        self.engine_seconds = seconds
        self._services.metrics.computed(self._task.tenant, self._task.task_type, seconds)

    @property
    def time_limit(self) -> float:
        """Seconds that the engine may compute."""
        return min(
            self._task.time_limit or self._services.task_type.time_limit,
            self._services.settings.max_time_limit,
        )

    def _note_answer(self, span: Span, answer: Done | Failed) -> None:
        engine = self._engine_lease.info
        if not span.recording or engine is None:
            return
        for name in ("name", "version", "model", "device"):
            span.set(f"inferq.engine.{name}", getattr(engine, name))
        span.set("inferq.cached", self.cached)
        if isinstance(answer, Failed):
            span.fail(answer.code)

    def progress(self, fraction: float, note: str) -> None:
        """Report the progress of the run."""
        task, delivery = self._task, self._delivery
        if tracing.on():
            tracing.current().event("progress", {"inferq.progress": fraction, "inferq.note": note})
        self._services.best_effort(
            partial(self._services.status.progress, task.tenant, task.task_id, fraction, note)
        )
        self._notifier.progress(
            task,
            fraction,
            note,
            attempt=delivery.attempt,
            redrives=delivery.redrives,
            at=datetime.now(UTC),
        )
