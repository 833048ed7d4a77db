"""One delivery from its arrival to its acknowledgement.

The story: parse → gather the facts → decide → compute → record → ack. Beside it stand `preparation` (the facts, and
the beginning of the run), `computation` (inputs and engine), `records` (what is made), `endings` (how an end is
recorded and reported), `attempt_report` (what log, trace and metrics say), and `refusal`.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from structlog.contextvars import bind_contextvars, clear_contextvars

from inferq.broker import Consumer, Delivery, named_id
from inferq.consumers.runtime.messages import Done, FileRef
from inferq.consumers.runtime.process import EngineDied, RunAborted
from inferq.consumers.worker.attempt_report import AttemptReport, Outcome, loggable
from inferq.consumers.worker.computation import Computation
from inferq.consumers.worker.decision import (
    AlreadyDone,
    Cancel,
    DeadLetter,
    Defer,
    Expire,
    Retry,
    Run,
    WaitForOtherRun,
    after_failure,
    after_unreadable,
    before_run,
    id_conflict,
)
from inferq.consumers.worker.endings import Endings
from inferq.consumers.worker.engine_supervisor import EngineLease, NotStarted
from inferq.consumers.worker.inputs import Inputs
from inferq.consumers.worker.preparation import Preparation, failed_to_fetch
from inferq.consumers.worker.records import Records
from inferq.consumers.worker.refusal import (
    WORKER_ERROR,
    refuse_after_fault,
    refuse_unreadable,
    worker_fault,
)
from inferq.consumers.worker.services import GracePassed, WorkerServices
from inferq.schemas import (
    Artifact,
    ErrorInfo,
    InferqError,
    InvalidTask,
    Outage,
    Priority,
    Result,
    Task,
    Timings,
    TransientFailure,
    parse_task,
    tracing,
)
from inferq.schemas.trace_context import TraceContext, trace_context
from inferq.storage import UnreadableResult

_log = logging.getLogger(__name__)


class TaskRun:
    """Brings one delivery to its end. `complete` always settles it, whatever happens on the way.

    `task` is None until the message is read.
    """

    def __init__(
        self,
        services: WorkerServices,
        consumer: Consumer,
        engine_lease: EngineLease,
        delivery: Delivery,
        lane: Priority,
        trace: TraceContext | None = None,
    ) -> None:
        self._services = services
        self._consumer = consumer
        self._engine_lease = engine_lease
        self._delivery = delivery
        self._token = f"{delivery.attempt}-{secrets.token_hex(6)}"
        self._scratch = f"{services.scratch.path}/{self._token}"
        # The span that processes the delivery; by default its producer's.
        trace = trace or trace_context(delivery.headers)
        self._records = Records(
            delivery, lane, type_name=services.task_type.name, worker=services.settings.worker_name,
            track=services.settings.track or None,
            trace_id=trace.trace_id if trace is not None else None,
        )  # fmt: skip
        self._endings = Endings(services, trace)
        self.lane = lane
        self._arrived_at = datetime.now(UTC)
        self.task: Task | None = None
        self._report = AttemptReport(services, delivery)
        self._digest = ""
        self._computation: Computation | None = None
        self._preparation: Preparation | None = None

    @property
    def arrived_at(self) -> datetime:
        return self._arrived_at

    @property
    def _started_at(self) -> datetime:
        return self._arrived_at if self._preparation is None else self._preparation.started_at

    def complete(self) -> Outcome:
        """Do everything that this delivery needs, settle it, and log its end."""
        delivery = self._delivery
        bind_contextvars(
            task_id=named_id(delivery), task_type=self._services.task_type.name, attempt=delivery.attempt
        )
        if self._records.trace_id is not None:
            bind_contextvars(trace_id=self._records.trace_id)
        try:
            return self._complete()
        finally:
            clear_contextvars()

    def _complete(self) -> Outcome:
        why = "the worker is stopping"
        outcome: Outcome
        try:
            outcome = self._outcome()
        except NotStarted as not_started:
            outcome, why = "given_back", str(not_started)
        except (GracePassed, RunAborted):
            outcome = "given_back"
        except Exception as error:
            # A delivery is settled whatever happens: one that ends its worker would end the next one, too.
            self._engine_lease.release()
            refused = refuse_after_fault(self._records, self._endings, error, started_at=self._started_at)
            if refused:
                self._report.count_failure(WORKER_ERROR)
            outcome, why = ("failed" if refused else "given_back"), "it failed unexpectedly"
        self._engine_lease.release()
        if self._computation is not None:
            self._computation.stop_renewing()
        if outcome == "given_back":
            if self._preparation is not None:
                self._preparation.release_run()
            self._consumer.requeue(self._delivery)
        else:
            self._consumer.ack(
                self._delivery,
                more=self._engine_lease.usable and self._services.takes_more,
                low_priority=self._engine_lease.shared,
            )
        # The status was sent before the ack; its answer comes while the broker sends the next task.
        self._endings.wait_for_replies()
        self._clean_scratch()
        self._report.end(
            outcome,
            why=why if outcome == "given_back" else None,
            engine=self._engine_lease.info,
            cached=self._computation is not None and self._computation.cached,
        )
        return outcome

    def _outcome(self) -> Outcome:
        try:
            task = parse_task(self._delivery.body)
        except InvalidTask as error:
            self._report.error = error
            return self._unreadable(error)
        self._report.begin(task)
        try:
            return self._decide(task)
        except UnreadableResult as error:
            return self._refuse(task, DeadLetter(InvalidTask(error.message, code=error.code), record=False))
        except (NotStarted, GracePassed, RunAborted):
            raise
        except Exception as error:
            # Fail the attempt, not the worker: the next worker would fail in the same way.
            return self._failed(task, worker_fault(self._records, error))

    def _unreadable(self, error: InvalidTask) -> Outcome:
        """Put off a task that only this version cannot read; refuse any other message that is no task."""
        self._engine_lease.release()
        delivery = self._delivery
        verdict = after_unreadable(
            error,
            accepted=delivery.digest is not None,
            version=delivery.version,
            deferrals=delivery.deferrals,
        )
        match verdict:
            case Defer():
                _log.warning(
                    "%s: put off for %d s: %s", self._records.name, verdict.seconds, verdict.error.code
                )
                self._endings.publish(self._records.deferral(verdict))
                return "deferred"
            case DeadLetter():
                self._report.count_failure(verdict.error.code)
                refuse_unreadable(
                    self._services, self._records, self._endings, verdict.error, started_at=self._started_at
                )
                return "failed"

    # Before the run.

    def _decide(self, task: Task) -> Outcome:
        services, delivery = self._services, self._delivery
        self.task = task
        self._report.stage = "queued"
        self._digest = self._records.digest(task)
        self._endings.use_callbacks_of(task)
        computation = self._computation = Computation(
            services, self._consumer, self._engine_lease, delivery, task,
            run=self._token, scratch=self._scratch, notifier=self._endings.notifier,
        )  # fmt: skip
        preparation = self._preparation = Preparation(
            services, self._engine_lease, delivery, computation,
            task=task, digest=self._digest, run=self._token, endings=self._endings,
            started_at=self._started_at, trace_id=self._records.trace_id,
        )  # fmt: skip
        facts, fetched = preparation.facts()
        verdict = before_run(facts)
        if not isinstance(verdict, Run):
            self._engine_lease.release()
        match verdict:
            case Run():
                if not (self._engine_lease.held or failed_to_fetch(fetched) or preparation.await_engine()):
                    return self._cancelled(task)
                computation.require_message()  # another worker may have begun it
                computation.running = True
                if not preparation.has_task_lease:
                    services.metrics.unleased_runs.labels(task.task_type).inc()
                self._endings.notifier.started(
                    task, attempt=delivery.attempt, redrives=delivery.redrives, at=self._started_at
                )
                return self._attempt(task, computation, fetched)
            case AlreadyDone(ended):
                # The gateway records the end of a cancelled task without knowing its metadata.
                ended = ended if ended.metadata else ended.model_copy(update={"metadata": task.metadata})
                self._endings.report(ended, digest=self._digest)
                return "skipped"
            case WaitForOtherRun():
                _log.debug(
                    "%s: another run of it is in progress or due; looking again in %d s",
                    self._records.name, verdict.seconds,
                )  # fmt: skip
                # First the copy, then the ack: the task never depends on the other run alone.
                self._endings.publish(self._records.waiting(verdict, digest=self._digest))
                return "duplicate"
            case Cancel():
                return self._cancelled(task)
            case Expire(error):
                self._report.count_failure(error.code)
                self._report.error = error
                self._endings.record(self._failure(task, error))
                return "failed"
            case DeadLetter() as dead_letter:
                return self._refuse(task, dead_letter)

    # The run.

    def _attempt(self, task: Task, computation: Computation, fetched: Future[Inputs] | None) -> Outcome:
        services = self._services
        timings = self._report.timings
        timings["queued"] = self._records.seconds_queued(task, self._started_at)
        engine_died = False
        try:
            self._report.stage = "fetch"
            inputs = computation.fetch() if fetched is None else fetched.result()
            timings["fetch"] = inputs.seconds
            self._report.stage = "inference"
            answer = computation.answer(inputs.files)
            self._engine_lease.release()
            timings["inference"] = answer.seconds
            if isinstance(answer, Done):
                return self._succeeded(task, computation, answer, timings)
            error: InferqError
            if answer.invalid:
                error = InvalidTask(answer.message, code=answer.code)
            else:
                error = TransientFailure(answer.message, code=answer.code)
        except RunAborted as aborted:
            if aborted.reason == "cancelled":
                return self._cancelled(task)
            raise
        except EngineDied as died:
            error, engine_died = died, True
            services.metrics.engine_deaths.inc()
        except (InvalidTask, TransientFailure) as failed:
            error = failed
        return self._failed(task, error, engine_died=engine_died, timings=Timings(**timings))

    # After the run. The engine is free for the next task before anything waits for a service.

    def _succeeded(
        self, task: Task, computation: Computation, done: Done, timings: dict[str, float | None]
    ) -> Outcome:
        services, began = self._services, time.monotonic()
        self._report.stage = "upload"
        with tracing.span("upload"):
            artifacts = tuple(self._upload(task, name, file) for name, file in done.artifacts.items())
        timings["upload"] = time.monotonic() - began
        result = self._records.success(
            task,
            digest=self._digest,
            started_at=self._started_at,
            artifacts=artifacts,
            timings=Timings(**{name: value for name, value in timings.items() if value is not None}),
            engine=self._engine_lease.info,
            cached=computation.cached,
        )
        kept = self._endings.record(result, done.output, engine_seconds=computation.engine_seconds)
        try:
            self._tidy_up(result, kept, computation)
        except (GracePassed, RunAborted):
            raise
        except Exception:
            # The task has ended: a fault from here on must not fail it.
            _log.exception("%s: recorded, but not everything after that was done", self._records.name)
        if kept.digest is not None and kept.digest != self._digest:
            return self._refuse(task, id_conflict(task))  # the other task ended during this run
        if kept is result:
            return "succeeded"
        services.metrics.repeated_runs.labels(task.task_type).inc()
        return "skipped"

    def _tidy_up(self, result: Result, kept: Result, computation: Computation) -> None:
        """Delete artifacts that no record names, and put the result into the cache."""
        services = self._services
        if kept is not result and result.artifacts:
            discard = partial(services.results.discard, result.tenant, result.task_id, run=self._token)
            services.retry_until_available("object store", discard)
        if services.cache is not None and computation.cache_key and kept is result and not computation.cached:
            with suppress(Outage):  # a later task is computed, and that is all
                services.cache.keep(result, computation.cache_key)
        services.metrics.observe(result.task_type, result.timings)

    def _upload(self, task: Task, name: str, file: FileRef) -> Artifact:
        return self._services.retry_until_available(
            "object store",
            partial(
                self._services.results.save_artifact,
                task.tenant,
                task.task_id,
                name,
                Path(file.path),
                file.content_type,
                run=self._token,
            ),
        )

    def _failed(
        self,
        task: Task,
        error: InferqError,
        *,
        engine_died: bool = False,
        timings: Timings | None = None,
    ) -> Outcome:
        """Retry a failed attempt, or end the task. Raises NotStarted if that is for another run to decide."""
        self._report.error = error
        self._require_authority(task)
        verdict = after_failure(
            error,
            attempt=self._delivery.attempt,
            max_attempts=self._services.settings.max_attempts or self._services.task_type.max_attempts,
            engine_deaths=self._delivery.engine_deaths,
            engine_died=engine_died,
        )
        self._report.count_failure(error.code)
        match verdict:
            case Retry():
                return self._retry(task, verdict)
            case DeadLetter():
                return self._dead_letter(task, verdict, timings)

    def _require_authority(self, task: Task) -> None:
        """Raise NotStarted if another run took over, or may have: only one of them may fail the task.

        A run with the lease decides even if its message was lost. Otherwise a task that fails after the broker's
        consumer timeout would start again each time, and never end.
        """
        if self._computation is None or not self._computation.running:
            return
        holder = self._services.best_effort(
            partial(self._services.status.lease_holder, task.tenant, task.task_id)
        )
        if holder == self._token:
            return
        if holder:
            raise NotStarted("another run of it took over")
        self._computation.require_message()

    def _retry(self, task: Task, retry: Retry) -> Outcome:
        self._engine_lease.release()
        tracing.current().fail(retry.error.code)
        attempt = self._delivery.attempt
        _log.warning(
            "%s: attempt %d failed, next in %d s: %s",
            self._records.name, attempt, retry.seconds, loggable(retry.error),
        )  # fmt: skip
        self._endings.notifier.settle()
        # First the copy, then the ack: a crash between the two duplicates, and duplicates are harmless.
        self._endings.publish(self._records.retry(task, retry, digest=self._digest))
        if self._computation is not None:
            self._computation.stop_renewing()
        self._services.report_end(
            partial(
                self._services.status.retrying,
                task,
                attempt=attempt,
                redrives=self._delivery.redrives,
                error=ErrorInfo.of(retry.error),
                digest=self._digest,
                run=self._token,
                engine_seconds=self._engine_seconds,
                trace_id=self._records.trace_id,
            )
        )
        return "retried"

    def _refuse(self, task: Task, verdict: DeadLetter) -> Outcome:
        """Dead-letter a task because of the task itself, not because a run failed."""
        self._report.count_failure(verdict.error.code)
        return self._dead_letter(task, verdict)

    def _dead_letter(self, task: Task, verdict: DeadLetter, timings: Timings | None = None) -> Outcome:
        self._engine_lease.release()
        self._report.error = verdict.error
        tracing.current().fail(verdict.error.code)
        _log.warning("%s: failed: %s", self._records.name, loggable(verdict.error))
        # The dead letter first: if only the record survived a crash, the redelivery would be skipped as done.
        self._endings.dead_letter(self._records.dead_letter(verdict.error, digest=self._digest))
        failure = self._failure(task, verdict.error, timings=timings)
        if verdict.record:
            self._endings.record(failure, engine_seconds=self._engine_seconds)
            return "failed"
        self._services.metrics.ended(failure)
        # The record belongs to another task, but this one has ended as well, and its owner is notified.
        if task.batch_line is not None:
            # The index does not touch a record that another task has begun.
            self._services.best_effort(partial(self._services.status.ended, failure))
        self._endings.notifier.ended(failure)
        return "failed"

    def _cancelled(self, task: Task) -> Outcome:
        self._engine_lease.release()
        error = InvalidTask("the task was cancelled", code="cancelled")
        cancelled = self._failure(task, error).model_copy(update={"status": "cancelled"})
        self._endings.record(cancelled, engine_seconds=self._engine_seconds)
        return "cancelled"

    @property
    def _engine_seconds(self) -> float:
        return 0.0 if self._computation is None else self._computation.engine_seconds

    def _failure(self, task: Task, error: InferqError, *, timings: Timings | None = None) -> Result:
        return self._records.failure(
            task,
            error,
            digest=self._digest,
            started_at=self._started_at,
            engine=self._engine_lease.info,
            timings=timings,
        )

    def _clean_scratch(self) -> None:
        try:
            # Most often it was never made; a Path for each task would cost more than the call.
            os.rmdir(self._scratch)  # noqa: PTH106
        except FileNotFoundError:
            return
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)
