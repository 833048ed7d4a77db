"""One delivery from its arrival to its acknowledgement."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from inferq.broker import Consumer, Delivery, Message, dead_message, named_id, retry_message
from inferq.consumers.runtime.messages import Done, Failed, FileRef
from inferq.consumers.runtime.process import LOOK_SECONDS, AbortReason, EngineDied, RunAborted, RunHooks
from inferq.consumers.worker.decision import (
    AlreadyDone,
    Cancel,
    DeadLetter,
    Expire,
    Facts,
    Retry,
    Run,
    after_failure,
    before_run,
    id_conflict,
)
from inferq.consumers.worker.engine_supervisor import EngineLease, EngineSupervisor, NotStarted
from inferq.consumers.worker.inputs import Inputs, fetch_inputs
from inferq.consumers.worker.notifier import Notifier, legible_url
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
)
from inferq.storage import UnreadableResult

_log = logging.getLogger(__name__)


_CONNECTION_LOST = "its connection was lost"


class TaskRun:
    """Brings one delivery to its end. `complete` always settles it, whatever happens on the way."""

    def __init__(
        self,
        services: WorkerServices,
        consumer: Consumer,
        supervisor: EngineSupervisor,
        delivery: Delivery,
        lane: Priority,
    ) -> None:
        self._services = services
        self._consumer = consumer
        self._supervisor = supervisor
        self._lease = EngineLease(supervisor)
        self._delivery = delivery
        self._lane = lane
        self._token = f"{delivery.attempt}-{secrets.token_hex(6)}"
        self._scratch = f"{services.scratch.path}/{self._token}"
        self._started_at = datetime.now(UTC)
        self._digest: str | None = None
        self._begun: Task | None = None
        self._cached = False
        self._cache_key: str | None = None
        self._held = True
        self._answers: list[Callable[[], bool]] = []
        self._notifier = Notifier(services.publisher, self._publish, url=None)

    def complete(self) -> None:
        """Do whatever this delivery needs, and settle it."""
        why = "the worker is stopping"
        try:
            outcome = self._outcome()
        except NotStarted as not_started:
            outcome, why = "given_back", str(not_started)
        except (GracePassed, RunAborted):
            outcome = "given_back"
        except Exception as error:
            # A delivery is settled whatever happens: one that ends its worker would go on to the next.
            _log.exception("%s: could not be brought to its end", self._name())
            outcome, why = self._give_up(error), "it could not be brought to its end"
        self._lease.release()
        if outcome == "given_back":
            self._release()
            self._consumer.requeue(self._delivery)
            _log.info("%s: given back, %s", self._name(), why)
        else:
            self._consumer.ack(
                self._delivery,
                more=self._supervisor.usable and self._services.takes_more,
                low_priority=self._supervisor.shared,
            )
        # The status was sent before the ack; its answer comes while the broker sends the next task.
        for answer in self._answers:
            self._services.report_end(answer)
        self._clean()
        self._services.metrics.tasks.labels(self._services.task_type.name, outcome).inc()

    def _give_up(self, error: Exception) -> str:
        """The last resort: a dead letter, and a record where one can be kept, which is better than a loop."""
        what = f"the worker failed: {type(error).__name__}: {error}"
        failure = TransientFailure(what, code="worker_error")
        self._lease.release()
        try:
            self._publish(self._dead(failure))
        except (GracePassed, RunAborted):
            return "given_back"
        except Exception:
            # It must not vanish without a trace: what is given back too often the broker puts aside itself.
            _log.exception("%s: cannot be dead-lettered", self._name())
            return "given_back"
        try:
            self._record_anyhow(failure)
        except (GracePassed, RunAborted):
            return "given_back"
        except Exception:
            _log.exception("%s: has no record of its end, only a dead letter", self._name())
        return "failed"

    def _record_anyhow(self, error: InferqError) -> None:
        """Without a record a batch would wait for its task for ever, and so would whoever asks for it."""
        task = parse_task(self._delivery.body)
        self._digest = task.digest()
        self._record(self._failure(task, error))

    def _release(self) -> None:
        """Say that this run is no lost one, now that another worker may begin the task."""
        if self._begun is not None:
            delivery = self._delivery
            released = self._services.status.released
            self._services.best_effort(
                partial(released, self._begun, attempt=delivery.attempt, redrives=delivery.redrives)
            )

    def _clean(self) -> None:
        try:
            # Most often it was never made; a Path for each task would cost more than the call.
            os.rmdir(self._scratch)  # noqa: PTH106
        except FileNotFoundError:
            return
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _outcome(self) -> str:
        try:
            task = parse_task(self._delivery.body)
        except InvalidTask as error:
            return self._refuse(error)
        try:
            return self._decide(task)
        except UnreadableResult as error:
            self._lease.release()
            return self._dead_letter(
                task, DeadLetter(InvalidTask(error.message, code=error.code), record=False)
            )
        except (NotStarted, GracePassed, RunAborted):
            raise
        except Exception as error:
            # A fault of the worker's own must cost this attempt, not the worker: it would meet it again.
            _log.exception("%s: the worker failed", self._name())
            self._lease.release()
            what = f"the worker failed: {type(error).__name__}: {error}"
            return self._failed(task, TransientFailure(what, code="worker_error"))

    # Before the run.

    def _decide(self, task: Task) -> str:
        services, delivery = self._services, self._delivery
        self._digest = task.digest()
        self._notifier = Notifier(
            services.publisher, self._publish, url=task.callback_url, events=task.callback_events
        )
        facts = Facts(
            task=task,
            digest=self._digest,
            type_name=services.task_type.name,
            redrives=delivery.redrives,
            now=self._started_at,
            deliveries=delivery.deliveries,
        )
        # A download must not keep the engine from a task that is ready for it.
        fetches_first = services.settings.take_ahead and bool(task.inputs())
        if not fetches_first and self._lease.acquire():
            # The engine reads the task, and the store is asked, while Redis answers.
            facts, fetched = self._look_and_fetch(facts, self._begin(task))
        else:
            # Before the run begins, all is done that needs no engine: until then that is another task's.
            facts, fetched = self._look_and_fetch(facts, lambda facts: facts)
            if isinstance(before_run(facts), Run):
                self._await_engine(task)
            self._started_at = datetime.now(UTC)
            facts = self._begin(task)(replace(facts, now=self._started_at))
            if facts.ended is None and facts.orphaned_runs is None:
                # The index does not count the run: another copy of the task may have ended meanwhile.
                facts = replace(facts, ended=self._earlier(task))
        verdict = before_run(facts)
        if not isinstance(verdict, Run):
            self._lease.release()
        match verdict:
            case Run():
                if not (self._lease.held or self._await_engine(task)):
                    return self._cancelled(task)
                if not self._consumer.holds(delivery):
                    raise NotStarted(
                        _CONNECTION_LOST
                    )  # what has begun goes on, but another worker may begin this now
                self._notifier.started(
                    task, attempt=delivery.attempt, redrives=delivery.redrives, at=self._started_at
                )
                return self._attempt(task, fetched)
            case AlreadyDone(ended):
                self._tell_end(ended)
                return "skipped"
            case Cancel():
                return self._cancelled(task)
            case Expire(error):
                self._record(self._failure(task, error))
                return "failed"
            case DeadLetter() as dead_letter:
                return self._dead_letter(task, dead_letter)

    def _begin(self, task: Task) -> Callable[[Facts], Facts]:
        """Tell that a run begins; what this gives waits for the answer, and adds it to what is known."""
        services, delivery = self._services, self._delivery
        answer = None
        if task.task_type == services.task_type.name:
            self._begun = task
            answer = services.best_effort(
                partial(
                    services.status.begin_pipelined,
                    task,
                    attempt=delivery.attempt,
                    redrives=delivery.redrives,
                    worker=services.settings.worker_name,
                    started_at=self._started_at,
                    digest=self._digest or "",
                    run=self._token,
                )
            )
            if self._lease.held:
                self._lease.engine.prepare(delivery.body.decode())

        def known(facts: Facts) -> Facts:
            begun = services.call_or_skip(answer) if answer else None
            if begun is None:
                return facts
            return replace(
                facts,
                recorded_digest=begun.digest,
                cancel_requested=begun.cancel_requested,
                orphaned_runs=begun.orphaned_runs,
            )

        return known

    def _look_and_fetch(
        self, facts: Facts, further: Callable[[Facts], Facts]
    ) -> tuple[Facts, Future[Inputs] | None]:
        """Look for an earlier result; the inputs come meanwhile, as mostly there is none.

        `further` adds what else becomes known. The inputs are None where there are none, or no use for them.
        """
        services, task = self._services, facts.task
        if not task.inputs():
            # A turn of another thread would cost a small task more than it saves.
            ended = self._earlier(task)
            return replace(further(facts), ended=ended), None
        looked_up = services.meanwhile(partial(self._earlier, task))
        facts = further(facts)
        fetched = self._fetch_ahead(task) if isinstance(before_run(facts), Run) else None
        return replace(facts, ended=looked_up.result()), fetched

    def _earlier(self, task: Task) -> Result | None:
        load = partial(self._services.results.load, task.tenant, task.task_id)
        return self._services.retry_until_available("object store", load)

    def _await_engine(self, task: Task) -> bool:
        """Wait until the engine is ours; False where the task is cancelled before. Raises NotBegun."""
        while True:
            if self._services.stopping:
                raise NotStarted("the worker is stopping")
            if not self._consumer.holds(self._delivery):
                raise NotStarted(_CONNECTION_LOST)
            if self._lease.acquire(LOOK_SECONDS):
                return True
            if self._abort_reason(task) == "cancelled":
                return False

    def _refuse(self, error: InvalidTask) -> str:
        """Dead-letter a message that is no task; its owner gets a failure where the message names one."""
        _log.warning("%s: refused: %s", self._name(), error)
        self._publish(self._dead(error))
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken = json.loads(self._delivery.body)
            record = Result(
                **_batch_line_of(broken),
                task_id=broken["task_id"],
                task_type=self._services.task_type.name,
                tenant=broken.get("tenant", "default"),
                status="failed",
                attempts=self._delivery.attempt,
                error=ErrorInfo.of(error),
                worker=self._services.settings.worker_name,
                started_at=self._started_at,
                finished_at=datetime.now(UTC),
                redrives=self._delivery.redrives,
            )
            if self._may_end(record):
                self._notifier = Notifier(
                    self._services.publisher, self._publish, url=legible_url(self._delivery.body)
                )
                self._record(record)
        return "failed"

    def _may_end(self, record: Result) -> bool:
        """Whether an unreadable message may have a record: an id of another, readable task is left to it."""
        services = self._services
        load = partial(services.results.load, record.tenant, record.task_id)
        try:
            kept = services.retry_until_available("object store", load)
        except UnreadableResult:
            return False
        if kept is not None:
            return kept.digest is None  # this message, handed out again
        return services.best_effort(partial(services.status.get, record.tenant, record.task_id)) is None

    # The run.

    def _attempt(self, task: Task, fetched: Future[Inputs] | None) -> str:
        services = self._services
        timings = {"queued": self._queued(task)}
        engine_died = False
        try:
            inputs = self._fetch(task) if fetched is None else fetched.result()
            timings["fetch"] = inputs.seconds
            answer = self._known(task, inputs.files) or self._compute(task, inputs.files)
            self._lease.release()
            timings["inference"] = answer.seconds
            if isinstance(answer, Done):
                return self._succeeded(task, answer, timings)
            error: InferqError
            if answer.invalid:
                error = InvalidTask(answer.message, code=answer.code)
            else:
                error = TransientFailure(answer.message, code=answer.code)
        except RunAborted as aborted:
            if aborted.reason == "cancelled":
                self._lease.release()
                return self._cancelled(task)
            raise
        except EngineDied as died:
            error, engine_died = died, True
            services.metrics.engine_deaths.inc()
        except (InvalidTask, TransientFailure) as failed:
            error = failed
        self._lease.release()
        return self._failed(task, error, engine_died=engine_died, timings=Timings(**timings))

    def _failed(
        self,
        task: Task,
        error: InferqError,
        *,
        engine_died: bool = False,
        timings: Timings | None = None,
    ) -> str:
        """An attempt has failed: see to another, or end the task."""
        verdict = after_failure(
            error,
            attempt=self._delivery.attempt,
            max_attempts=self._services.settings.max_attempts or self._services.task_type.max_attempts,
            engine_deaths=self._delivery.engine_deaths,
            engine_died=engine_died,
        )
        match verdict:
            case Retry():
                return self._retry(task, verdict)
            case DeadLetter():
                return self._dead_letter(task, verdict, timings)

    def _fetch_ahead(self, task: Task) -> Future[Inputs]:
        """Fetch the inputs before it is sure that they are needed; what goes wrong counts if they are."""
        fetched: Future[Inputs] = Future()
        try:
            fetched.set_result(self._fetch(task))
        except Exception as error:
            fetched.set_exception(error)
        return fetched

    def _fetch(self, task: Task) -> Inputs:
        return fetch_inputs(self._services, task, Path(self._scratch), partial(self._abort_reason, task))

    def _known(self, task: Task, inputs: dict[str, FileRef]) -> Done | None:
        """What the result cache answers, where there is one."""
        cache, engine = self._services.cache, self._lease.info
        if cache is None or engine is None:
            return None
        self._cache_key = cache.key(task, inputs, engine)
        if self._cache_key is None:
            return None
        find = partial(cache.find, task.tenant, self._cache_key, Path(self._scratch))
        found = self._services.retry_until_available("object store", find)
        self._cached = found is not None
        return found

    def _compute(self, task: Task, inputs: dict[str, FileRef]) -> Done | Failed:
        services = self._services
        tenant, task_id = task.tenant, task.task_id

        def progress(fraction: float, note: str) -> None:
            services.best_effort(partial(services.status.progress, tenant, task_id, fraction, note))
            self._notifier.progress(
                task,
                fraction,
                note,
                attempt=self._delivery.attempt,
                redrives=self._delivery.redrives,
                at=datetime.now(UTC),
            )

        return self._lease.engine.run(
            self._delivery.body.decode(),
            self._scratch,
            inputs,
            watch=RunHooks(progress, partial(self._abort_reason, task)),
            time_limit=task.time_limit or services.task_type.time_limit,
            abort_grace=services.settings.abort_grace,
        )

    def _abort_reason(self, task: Task) -> AbortReason | None:
        """Why the run should stop, if it should."""
        if self._services.grace_passed:
            return "shutdown"
        if self._held and not self._consumer.holds(self._delivery):
            # Another worker may begin it while this run goes on: lost lines must not pass for lost runs.
            self._held = False
            self._release()
        if self._services.best_effort(
            partial(
                self._services.status.cancel_requested,
                task.tenant,
                task.task_id,
                task.batch_id,
                task.batch_line,
            )
        ):
            return "cancelled"
        return None

    def _queued(self, task: Task) -> float | None:
        since = task.created_at or self._delivery.timestamp
        return max(0.0, (self._started_at - since).total_seconds()) if since else None

    # After the run.

    def _succeeded(self, task: Task, done: Done, timings: dict[str, float | None]) -> str:
        services = self._services
        began = time.monotonic()
        artifacts = tuple(self._upload(task, name, note) for name, note in done.artifacts.items())
        timings["upload"] = time.monotonic() - began
        result = Result(
            task_id=task.task_id,
            task_type=task.task_type,
            tenant=task.tenant,
            status="succeeded",
            artifacts=artifacts,
            attempts=self._delivery.attempt,
            timings=Timings(**{name: value for name, value in timings.items() if value is not None}),
            engine=self._lease.info,
            batch_id=task.batch_id,
            batch_line=task.batch_line,
            metadata=task.metadata,
            worker=services.settings.worker_name,
            created_at=task.created_at,
            started_at=self._started_at,
            finished_at=datetime.now(UTC),
            digest=self._digest,
            cached=self._cached,
            redrives=self._delivery.redrives,
        )
        kept = self._record(result, done.output)
        if kept is not result and artifacts:
            discard = partial(services.results.discard, task.tenant, task.task_id, attempt_token=self._token)
            services.retry_until_available("object store", discard)
        if services.cache is not None and self._cache_key is not None and kept is result and not self._cached:
            with suppress(Outage):  # the next one is computed again, and that is all
                services.cache.keep(result, self._cache_key)
        services.metrics.observe(task.task_type, result.timings)
        if kept.digest is not None and kept.digest != self._digest:
            return self._dead_letter(task, id_conflict(task))  # the other one came between
        return "succeeded" if kept is result else "skipped"

    def _upload(self, task: Task, name: str, note: FileRef) -> Artifact:
        return self._services.retry_until_available(
            "object store",
            partial(
                self._services.results.save_artifact,
                task.tenant,
                task.task_id,
                name,
                Path(note.path),
                note.content_type,
                attempt_token=self._token,
            ),
        )

    def _record(self, result: Result, output: bytes | None = None) -> Result:
        """Write how the task ended, once; the status follows what is kept.

        `output` is the output as JSON text, which the result leaves out.
        """
        services = self._services
        kept = services.retry_until_available("object store", partial(services.results.save, result, output))
        self._tell_end(kept, output if kept is result else None)
        return kept

    def _tell_end(self, result: Result, output: bytes | None = None) -> None:
        answer = self._services.best_effort(partial(self._services.status.ended_pipelined, result, output))
        if answer is not None:
            self._answers.append(answer)
        # While Redis answers. Another task's record under this id is not this task's to tell.
        if result.digest == self._digest:
            self._notifier.ended(result, output)

    def _retry(self, task: Task, retry: Retry) -> str:
        attempt = self._delivery.attempt
        _log.warning(
            "%s: attempt %d failed, next in %d s: %s", self._name(), attempt, retry.seconds, retry.error
        )
        self._notifier.settle()
        # First the copy, then the ack: a crash between the two duplicates, and duplicates are harmless.
        self._publish(
            retry_message(
                self._delivery,
                task_id=task.task_id,
                type_name=task.task_type,
                priority=self._lane,
                seconds=retry.seconds,
                engine_deaths=retry.engine_deaths,
            )
        )
        self._services.report_end(
            partial(
                self._services.status.retrying,
                task,
                attempt=attempt,
                redrives=self._delivery.redrives,
                error=ErrorInfo.of(retry.error),
            )
        )
        return "retried"

    def _dead_letter(self, task: Task, dead_letter: DeadLetter, timings: Timings | None = None) -> str:
        _log.warning("%s: failed: %s", self._name(), dead_letter.error)
        # The dead letter first: a crash after the record alone would pass for a task that is done with.
        self._publish(self._dead(dead_letter.error))
        failure = self._failure(task, dead_letter.error, timings=timings)
        if dead_letter.record:
            self._record(failure)
            return "failed"
        # The record is another's, but this task has ended, and its owner gets to know.
        if task.batch_line is not None:
            # The index leaves what another has begun alone.
            self._services.best_effort(partial(self._services.status.ended, failure))
        self._notifier.ended(failure)
        return "failed"

    def _cancelled(self, task: Task) -> str:
        error = InvalidTask("the task was cancelled", code="cancelled")
        self._record(self._failure(task, error).model_copy(update={"status": "cancelled"}))
        return "cancelled"

    def _failure(self, task: Task, error: InferqError, *, timings: Timings | None = None) -> Result:
        return Result.failure(
            task,
            error,
            attempts=self._delivery.attempt,
            finished_at=datetime.now(UTC),
            digest=self._digest,
            timings=timings,
            engine=self._lease.info,
            worker=self._services.settings.worker_name,
            started_at=self._started_at,
            redrives=self._delivery.redrives,
        )

    def _dead(self, error: InferqError) -> Message:
        return dead_message(
            self._delivery,
            type_name=self._services.task_type.name,
            priority=self._lane,
            error=error,
            worker=self._services.settings.worker_name,
        )

    def _publish(self, message: Message) -> None:
        def confirmed() -> None:
            self._services.publisher.publish(message).result()

        self._services.retry_until_available("RabbitMQ", confirmed)

    def _name(self) -> str:
        return f"task {named_id(self._delivery)!r} on {self._delivery.queue}"


def _batch_line_of(broken: dict[str, Any]) -> dict[str, Any]:
    """Of which line of which batch an unreadable message is, where it says so legibly."""
    with suppress(KeyError, ValueError):
        line = {name: broken[name] for name in ("batch_id", "batch_line")}
        Task.model_validate({"task_id": "any", "task_type": "any", **line})
        return line
    return {}
