"""One attempt of a task: decided, computed, recorded, or failed. `task_run` settles its delivery.

A method that may end the attempt returns the outcome, or None if it goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NamedTuple

from inferq.broker import Delivery
from inferq.consumers.runtime.messages import Done, Failed, FileRef
from inferq.consumers.runtime.process import EngineDied, RunAborted
from inferq.consumers.worker.attempt_report import AttemptReport, Outcome, loggable
from inferq.consumers.worker.computation import Computation
from inferq.consumers.worker.decision import (
    AlreadyDone,
    Cancel,
    DeadLetter,
    Expire,
    Facts,
    Retry,
    Run,
    WaitForOtherRun,
    WaitForSameWork,
    after_failure,
    before_run,
    id_conflict,
)
from inferq.consumers.worker.endings import Endings
from inferq.consumers.worker.engine_supervisor import EngineLease, NotStarted
from inferq.consumers.worker.inputs import Inputs
from inferq.consumers.worker.preparation import Preparation, failed_to_fetch
from inferq.consumers.worker.records import Records
from inferq.consumers.worker.services import GracePassed, WorkerServices
from inferq.schemas import (
    Artifact,
    ErrorInfo,
    InferqError,
    InvalidTask,
    Outage,
    Result,
    Task,
    Timings,
    TransientFailure,
    tracing,
)
from inferq.storage import CommandGroup

_log = logging.getLogger(__name__)

Answer = Done | Failed | RunAborted | InvalidTask | TransientFailure
"""What came of the computing of a task: an output, a failure, a cancel, or why there is no answer."""


class Success(NamedTuple):
    """A result that is to be recorded, and its output as JSON text if that goes beside it."""

    result: Result
    output: bytes | None


class Attempt:
    """An attempt of `task`; `run` is its token, which names its lease and its folder of artifacts.

    `release_engine` lets the next task have the engine: before anything waits for a service.
    """

    def __init__(
        self,
        services: WorkerServices,
        engine_lease: EngineLease,
        delivery: Delivery,
        task: Task,
        *,
        run: str,
        digest: str,
        records: Records,
        endings: Endings,
        report: AttemptReport,
        computation: Computation,
        preparation: Preparation,
        release_engine: Callable[[], None],
    ) -> None:
        self._services = services
        self._engine_lease = engine_lease
        self._delivery = delivery
        self._token = run
        self._digest = digest
        self._records = records
        self._endings = endings
        self._report = report
        self._release_engine = release_engine
        self.task = task
        self.computation = computation
        self.preparation = preparation
        self.success: Success | None = None

    def alone(self) -> Outcome | None:
        """Prepare the task, compute it, and record its result."""
        facts, fetched = self.preparation.facts()
        outcome = self.decide(facts, fetched)
        if outcome is None:
            outcome = self.conclude(self.compute(fetched))
        if outcome is None and self.success is not None:
            result, output = self.success
            kept = self._endings.record(
                result, output,
                engine_seconds=self.computation.engine_seconds, before_report=partial(self.keep_in_cache, result),
            )  # fmt: skip
            outcome = self.recorded(result, kept)
        return outcome

    def decide(self, facts: Facts, fetched: Future[Inputs] | None) -> Outcome | None:
        """End a task that is not to be computed; else its run begins, once it has the engine."""
        services, delivery, task = self._services, self._delivery, self.task
        preparation, computation = self.preparation, self.computation
        verdict = before_run(facts)
        if not isinstance(verdict, Run):
            self._release_engine()
        match verdict:
            case Run():
                needs_engine = not (failed_to_fetch(fetched) or computation.cached)
                if needs_engine and not (self._engine_lease.held or preparation.await_engine()):
                    return self.cancelled()
                computation.require_message()  # another worker may have begun it
                computation.running = True
                if not preparation.has_task_lease:
                    services.metrics.unleased_runs.labels(task.task_type).inc()
                self._endings.notifier.started(
                    task, attempt=delivery.attempt, redrives=delivery.redrives, at=self.preparation.started_at
                )
                self._report.timings["queued"] = self._records.seconds_queued(
                    task, self.preparation.started_at
                )
                return None
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
            case WaitForSameWork():
                _log.debug(
                    "%s: another task's run computes the same; looking for its result in %d s",
                    self._records.name, verdict.seconds,
                )  # fmt: skip
                services.metrics.looked_up(task.task_type, "waited")
                self._endings.publish(self._records.waiting(verdict, digest=self._digest))
                return "waiting"
            case Cancel():
                return self.cancelled()
            case Expire(error):
                self._report.count_failure(error.code)
                self._report.error = error
                self._endings.record(self._failure(error))
                return "failed"
            case DeadLetter() as dead_letter:
                return self.refuse(dead_letter)

    # The run.

    def compute(self, fetched: Future[Inputs] | None) -> Answer:
        """Fetch the inputs, if that is not done yet, and have the task computed."""
        try:
            return self.computation.answer(self.inputs(fetched).files)
        except RunAborted as aborted:
            if aborted.reason == "cancelled":
                return aborted
            raise
        except (InvalidTask, TransientFailure) as error:
            return error

    def inputs(self, fetched: Future[Inputs] | None) -> Inputs:
        """The task's inputs: those that were fetched early, or they are fetched now."""
        self._report.stage = "fetch"
        inputs = self.computation.fetch() if fetched is None else fetched.result()
        self._report.timings["fetch"] = inputs.seconds
        self._report.stage = "inference"
        return inputs

    # After the run.

    def conclude(self, answer: Answer) -> Outcome | None:
        """Make the result of a success, and upload its artifacts; bring anything else to its end."""
        self._release_engine()
        timings = self._report.timings
        error: InferqError
        match answer:
            case Done():
                timings["inference"] = answer.seconds / answer.batch_size
                self.success = self._succeeded(answer)
                return None
            case RunAborted():
                return self.cancelled()
            case Failed():
                timings["inference"] = answer.seconds / answer.batch_size
                kind = InvalidTask if answer.invalid else TransientFailure
                error = kind(answer.message, code=answer.code)
            case _:
                error = answer
        died = isinstance(error, EngineDied)
        if died:
            self._services.metrics.engine_deaths.inc()
        return self.failed(error, engine_died=died, timings=Timings(**timings))

    def _succeeded(self, done: Done) -> Success:
        began = time.monotonic()
        timings = self._report.timings
        self._report.stage = "upload"
        with tracing.span("upload"):
            artifacts = tuple(self._upload(name, file) for name, file in done.artifacts.items())
        timings["upload"] = time.monotonic() - began
        result = self._records.success(
            self.task,
            digest=self._digest,
            started_at=self.preparation.started_at,
            artifacts=artifacts,
            timings=Timings(**{name: value for name, value in timings.items() if value is not None}),
            engine=self._engine_lease.info,
            cached=self.computation.cached,
            batch_size=done.batch_size,
        )
        return Success(result, done.output)

    def keep_in_cache(self, result: Result, kept: Result) -> None:
        """Put a success into the cache, before its end is reported: then others no longer wait for this run."""
        cache, computation = self._services.cache, self.computation
        if cache is None or computation.cache_key is None or computation.cached or kept is not result:
            return
        try:
            cache.keep(result, computation.cache_key)
        except Outage as error:  # a later task is computed, and that is all
            _log.debug("%s: not put into the result cache: %s", self._records.name, error)
        except Exception:
            _log.exception("%s: not put into the result cache", self._records.name)

    def report(self, success: Success, kept: Result, group: CommandGroup) -> None:
        """Report the record that is kept. Does not wait: the `group` carries the status, which is sent later."""
        result, output = success
        engine_seconds = self.computation.engine_seconds
        self._endings.saved(result, kept, output, engine_seconds=engine_seconds, group=group)

    def recorded(self, result: Result, kept: Result) -> Outcome:
        """After the `result` is recorded and reported; `kept` is what is on record, perhaps an earlier run's."""
        self._endings.notifier.settle()
        try:
            self._tidy_up(result, kept)
        except (GracePassed, RunAborted):
            raise
        except Exception:
            # The task has ended: a fault from here on must not fail it.
            _log.exception("%s: recorded, but not everything after that was done", self._records.name)
        if kept.digest is not None and kept.digest != self._digest:
            return self.refuse(id_conflict(self.task))  # the other task ended during this run
        if kept is result:
            return "succeeded"
        self._services.metrics.repeated_runs.labels(result.task_type).inc()
        return "skipped"

    def _tidy_up(self, result: Result, kept: Result) -> None:
        """Delete artifacts that no record names."""
        services = self._services
        if kept is not result and result.artifacts:
            discard = partial(services.results.discard, result.tenant, result.task_id, run=self._token)
            services.retry_until_available("object store", discard)
        services.metrics.observe(result.task_type, result.timings)

    def _upload(self, name: str, file: FileRef) -> Artifact:
        return self._services.retry_until_available(
            "object store",
            partial(
                self._services.results.save_artifact,
                self.task.tenant,
                self.task.task_id,
                name,
                Path(file.path),
                file.content_type,
                run=self._token,
            ),
        )

    def failed(
        self,
        error: InferqError,
        *,
        engine_died: bool = False,
        timings: Timings | None = None,
    ) -> Outcome:
        """Retry a failed attempt, or end the task. Raises NotStarted if that is for another run to decide."""
        self._report.error = error
        self._require_authority()
        verdict = after_failure(
            error,
            attempt=self._delivery.attempt,
            max_attempts=self._services.settings.max_attempts or self._services.task_type.max_attempts,
            engine_deaths=self._delivery.engine_deaths,
            engine_died=engine_died,
        )
        self._report.count_failure(error.code)
        if (work := self.computation.cache_key) is not None:
            # What fails again and again must not hold up those that wait for it.
            self._services.best_effort(partial(self._services.status.work_failed, self.task.tenant, work))
        match verdict:
            case Retry():
                return self._retry(verdict)
            case DeadLetter():
                return self._dead_letter(verdict, timings)

    def _require_authority(self) -> None:
        """Raise NotStarted if another run took over, or may have: only one of them may fail the task.

        A run with the lease decides even if its message was lost. Otherwise a task that fails after the broker's
        consumer timeout would start again each time, and never end.
        """
        if not self.computation.running:
            return
        holder = self._services.best_effort(
            partial(self._services.status.lease_holder, self.task.tenant, self.task.task_id)
        )
        if holder == self._token:
            return
        if holder:
            raise NotStarted("another run of it took over")
        self.computation.require_message()

    def _retry(self, retry: Retry) -> Outcome:
        self._release_engine()
        tracing.current().fail(retry.error.code)
        attempt = self._delivery.attempt
        _log.warning(
            "%s: attempt %d failed, next in %d s: %s",
            self._records.name, attempt, retry.seconds, loggable(retry.error),
        )  # fmt: skip
        self._endings.notifier.settle()
        # First the copy, then the ack: a crash between the two duplicates, and duplicates are harmless.
        self._endings.publish(self._records.retry(self.task, retry, digest=self._digest))
        self.computation.stop_renewing()
        self._services.report_end(
            partial(
                self._services.status.retrying,
                self.task,
                attempt=attempt,
                redrives=self._delivery.redrives,
                error=ErrorInfo.of(retry.error),
                digest=self._digest,
                run=self._token,
                engine_seconds=self.computation.engine_seconds,
                trace_id=self._records.trace_id,
            )
        )
        return "retried"

    def refuse(self, verdict: DeadLetter) -> Outcome:
        """Dead-letter a task because of the task itself, not because a run failed."""
        self._report.count_failure(verdict.error.code)
        return self._dead_letter(verdict)

    def _dead_letter(self, verdict: DeadLetter, timings: Timings | None = None) -> Outcome:
        self._release_engine()
        self._report.error = verdict.error
        tracing.current().fail(verdict.error.code)
        _log.warning("%s: failed: %s", self._records.name, loggable(verdict.error))
        # The dead letter first: if only the record survived a crash, the redelivery would be skipped as done.
        self._endings.dead_letter(self._records.dead_letter(verdict.error, digest=self._digest))
        failure = self._failure(verdict.error, timings=timings)
        if verdict.record:
            self._endings.record(failure, engine_seconds=self.computation.engine_seconds)
            return "failed"
        self._services.metrics.ended(failure)
        # The record belongs to another task, but this one has ended as well, and its owner is notified.
        if self.task.batch_line is not None:
            # The index does not touch a record that another task has begun.
            self._services.best_effort(partial(self._services.status.ended, failure))
        self._endings.notifier.ended(failure)
        return "failed"

    def cancelled(self) -> Outcome:
        """End the task as cancelled."""
        self._release_engine()
        error = InvalidTask("the task was cancelled", code="cancelled")
        cancelled = self._failure(error).model_copy(update={"status": "cancelled"})
        self._endings.record(cancelled, engine_seconds=self.computation.engine_seconds)
        return "cancelled"

    def _failure(self, error: InferqError, *, timings: Timings | None = None) -> Result:
        return self._records.failure(
            self.task,
            error,
            digest=self._digest,
            started_at=self.preparation.started_at,
            engine=self._engine_lease.info,
            timings=timings,
        )
