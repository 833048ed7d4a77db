"""One delivery from its arrival to its acknowledgement.

The story: parse → gather the facts → decide → compute → record → ack. `attempt` tells it from the facts to the record.
Beside it stand `preparation` (the facts, and the beginning of the run), `computation` (inputs and engine), `records`
(what is made), `endings` (how an end is recorded and reported), `attempt_report` (what log, trace and metrics say), and
`refusal`. `group_run` takes several deliveries through it together.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable
from contextvars import copy_context
from datetime import UTC, datetime
from functools import partial

from structlog.contextvars import bind_contextvars

from inferq.broker import Consumer, Delivery, named_id
from inferq.broker.spans import processing
from inferq.consumers.runtime.process import RunAborted
from inferq.consumers.worker.attempt import Attempt
from inferq.consumers.worker.attempt_report import AttemptReport, Outcome
from inferq.consumers.worker.computation import Computation
from inferq.consumers.worker.decision import (
    DeadLetter,
    Defer,
    after_unreadable,
)
from inferq.consumers.worker.endings import Endings
from inferq.consumers.worker.engine_supervisor import BatchEndedEngine, EngineLease, NotStarted
from inferq.consumers.worker.preparation import Preparation
from inferq.consumers.worker.records import Records
from inferq.consumers.worker.refusal import (
    WORKER_ERROR,
    refuse_after_fault,
    refuse_unreadable,
    worker_fault,
)
from inferq.consumers.worker.services import GracePassed, WorkerServices
from inferq.schemas import (
    InvalidTask,
    Priority,
    Task,
    parse_task,
)
from inferq.schemas.trace_context import trace_context
from inferq.storage import UnreadableResult

_log = logging.getLogger(__name__)


class TaskRun:
    """Brings one delivery to its end. `complete` always settles it, whatever happens on the way.

    A step of the story returns the outcome, or None if the story goes on; `take` takes it. `task` is None until the
    message is read. `joined`: its group holds the engine and releases it. `closed`: it is
    settled, and nothing is left to do.
    """

    def __init__(
        self,
        services: WorkerServices,
        consumer: Consumer,
        engine_lease: EngineLease,
        delivery: Delivery,
        lane: Priority,
    ) -> None:
        self._services = services
        self._consumer = consumer
        self._engine_lease = engine_lease
        self._token = f"{delivery.attempt}-{secrets.token_hex(6)}"
        self._scratch = f"{services.scratch.path}/{self._token}"
        self._context = copy_context()  # what it logs and traces names this task, whatever runs beside it
        self._span = processing(delivery)
        self._context.run(self._span.__enter__)
        # By default its producer's.
        trace = self._span.context or trace_context(delivery.headers)
        trace_id = trace.trace_id if trace is not None else None
        self._context.run(
            bind_contextvars,
            task_id=named_id(delivery), task_type=services.task_type.name, attempt=delivery.attempt,
            **({} if trace_id is None else {"trace_id": trace_id}),
        )  # fmt: skip
        self._records = Records(
            delivery, lane, type_name=services.task_type.name, worker=services.settings.worker_name,
            track=services.settings.track or None, trace_id=trace_id,
        )  # fmt: skip
        self._endings = Endings(services, trace)
        self.delivery = delivery
        self.lane = lane
        self.arrived_at = datetime.now(UTC)
        self.outcome: Outcome | None = None
        self.joined = False
        self.closed = False
        self._why = ""
        self._may_end_engines = False
        self._report = AttemptReport(services, delivery)
        self.attempt: Attempt | None = None

    @property
    def task(self) -> Task | None:
        """None until the message is read."""
        return None if self.attempt is None else self.attempt.task

    @property
    def _started_at(self) -> datetime:
        return self.arrived_at if self.attempt is None else self.attempt.preparation.started_at

    def complete(self) -> Outcome:
        """Do everything that this delivery needs, settle it, and log its end."""
        if self.attempt is None:
            self.take(self.read)
        self.take_attempt(Attempt.alone)
        return self.settle()

    def take(self, step: Callable[[], Outcome | None]) -> None:
        """Take a step, unless the run has ended. What the step raises ends it."""
        if self.outcome is None:
            self.outcome = self._context.run(self._take, step)

    @property
    def may_end_workers(self) -> bool:
        """Whether a worker may have died of it before, as far as is known: it shares no batch then."""
        task = self.task
        if not self.delivery.redelivered or task is None:
            return False
        begun = partial(self._services.status.has_begun, task.tenant, task.task_id)
        return self._services.best_effort(begun) is not False

    def take_attempt(self, step: Callable[[Attempt], Outcome | None]) -> None:
        """The same for a step of the attempt."""
        if (attempt := self.attempt) is not None:
            self.take(lambda: step(attempt))

    def _take(self, step: Callable[[], Outcome | None]) -> Outcome | None:
        try:
            return self._try(step)
        except NotStarted as not_started:
            self._may_end_engines = isinstance(not_started, BatchEndedEngine)
            return self._given_back(str(not_started))
        except (GracePassed, RunAborted):
            return self._given_back("the worker is stopping")
        except Exception as error:
            # A delivery is settled whatever happens: one that ends its worker would end the next one, too.
            self._release_engine()
            if refuse_after_fault(self._records, self._endings, error, started_at=self._started_at):
                self._report.count_failure(WORKER_ERROR)
                return "failed"
            return self._given_back("it failed unexpectedly")

    def _try(self, step: Callable[[], Outcome | None]) -> Outcome | None:
        try:
            return step()
        except UnreadableResult as error:
            if self.attempt is None:
                raise
            return self.attempt.refuse(DeadLetter(InvalidTask(error.message, code=error.code), record=False))
        except (NotStarted, GracePassed, RunAborted):
            raise
        except Exception as error:
            if self.attempt is None:
                raise
            # Fail the attempt, not the worker: the next worker would fail in the same way.
            return self.attempt.failed(worker_fault(self._records, error))

    def _given_back(self, why: str) -> Outcome:
        self._why = why
        return "given_back"

    def _release_engine(self) -> None:
        """The engine is free for the next task before anything waits for a service."""
        if self.joined:
            return
        computed = self._engine_lease.held
        self._engine_lease.release()
        if computed:
            self._consumer.look_early()

    # The end.

    def settle(self) -> Outcome:
        """Acknowledge the delivery, or requeue it, and log the end."""
        self._release_engine()
        outcome = self.end()
        if outcome == "given_back":
            self._consumer.requeue(self.delivery)
        else:
            self._consumer.ack(
                self.delivery,
                more=self._engine_lease.usable and self._services.takes_more,
                low_priority=self._engine_lease.shared,
            )
        self._engine_lease.finish()
        self.close(outcome)
        return outcome

    def end(self) -> Outcome:
        """How the run ended: the delivery can be settled accordingly."""
        if self.outcome is None:
            self.outcome = self._given_back("it did not end")
        if self.attempt is not None:
            self.attempt.computation.stop_renewing()
            if self.outcome == "given_back":
                release = partial(self.attempt.preparation.release_run, keep_run=self._may_end_engines)
                self._context.run(release)
        return self.outcome

    def close(self, outcome: Outcome) -> None:
        """After the delivery is settled: what nobody waits for."""
        self.closed = True
        self._context.run(self._close, outcome)

    def _close(self, outcome: Outcome) -> None:
        # The status was sent before the ack; its answer comes while the broker sends the next task.
        self._endings.wait_for_replies()
        self._clean_scratch()
        self._report.end(
            outcome,
            why=self._why if outcome == "given_back" else None,
            engine=self._engine_lease.info,
            cached=self.attempt is not None and self.attempt.computation.cached,
        )
        self._span.set("inferq.outcome", outcome)
        self._span.__exit__(None, None, None)

    # The beginning.

    def read(self) -> Outcome | None:
        """Parse the message; refuse what is no task."""
        try:
            task = parse_task(self.delivery.body)
        except InvalidTask as error:
            self._report.error = error
            return self._unreadable(error)
        self._report.begin(task)
        self._report.stage = "queued"
        digest = self._records.digest(task)
        self._endings.use_callbacks_of(task)
        computation = Computation(
            self._services, self._consumer, self._engine_lease, self.delivery, task,
            run=self._token, scratch=self._scratch, notifier=self._endings.notifier,
        )  # fmt: skip
        preparation = Preparation(
            self._services, self._engine_lease, self.delivery, computation,
            task=task, digest=digest, run=self._token, endings=self._endings,
            started_at=self.arrived_at, trace_id=self._records.trace_id,
        )  # fmt: skip
        self.attempt = Attempt(
            self._services, self._engine_lease, self.delivery, task,
            run=self._token, digest=digest, records=self._records, endings=self._endings,
            report=self._report, computation=computation, preparation=preparation,
            release_engine=self._release_engine,
        )  # fmt: skip
        return None

    def _unreadable(self, error: InvalidTask) -> Outcome:
        """Put off a task that only this version cannot read; refuse any other message that is no task."""
        self._release_engine()
        delivery = self.delivery
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

    def _clean_scratch(self) -> None:
        try:
            # Most often it was never made; a Path for each task would cost more than the call.
            os.rmdir(self._scratch)  # noqa: PTH106
        except FileNotFoundError:
            return
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)
