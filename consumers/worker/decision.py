"""What to do next with a delivery: pure functions from facts to a decision.

Nothing here touches the broker, the store or the engine, so every case can be tested without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from inferq.broker import retry_level
from inferq.schemas import SCHEMA_VERSION, InferqError, InvalidTask, Result, Task, TransientFailure

MAX_ENGINE_DEATHS = 3
"""A task that ended this many engine processes is poison."""


@dataclass(frozen=True)
class Run:
    """Compute it."""


@dataclass(frozen=True)
class AlreadyDone:
    """The task ended before, with the result `ended`: acknowledge, no more."""

    ended: Result


@dataclass(frozen=True)
class Cancel:
    """Its owner cancelled it: record that, without a run."""


@dataclass(frozen=True)
class Expire:
    """It expired before it was started: record that, without a run."""

    error: InferqError


@dataclass(frozen=True)
class Retry:
    """Try again `seconds` from now, as the next attempt."""

    seconds: int
    error: InferqError
    engine_deaths: int


@dataclass(frozen=True)
class WaitForOtherRun:
    """Another run of the task is in progress, or due: look again in `seconds`, as the same attempt.

    `waits`: how often in a row this copy then waited for a run that is due.
    """

    seconds: int
    waits: int = 0


@dataclass(frozen=True)
class WaitForSameWork:
    """A run of another task computes the same: look in `seconds` for its result, as the same attempt."""

    seconds: int


@dataclass(frozen=True)
class Defer:
    """Put the same attempt off for `seconds`: a worker of another version may read the task."""

    seconds: int
    error: InferqError


@dataclass(frozen=True)
class DeadLetter:
    """Dead-letter it for `error`. `record`: whether to write the failure; not if the record is another task's."""

    error: InferqError
    record: bool = True


MAX_ORPHANED_RUNS = 5
"""A task whose runs were orphaned this often in a row most likely ends its workers: it is poison.

Above MAX_ENGINE_DEATHS, because workers also end for reasons that are not the task's (a lost node, a machine
out of memory). Well below MAX_DELIVERIES, because each further try costs all tasks a worker."""

MAX_DELIVERIES = 25
"""A task that RabbitMQ delivered this often is poison; used when Redis has lost its count of orphaned runs.

RabbitMQ before 4.3 counts requeues as well, so this is well above their number. It is well below the broker's
delivery limit."""

MAX_DEFERRALS = 24
"""How often a task is put off that this version cannot read: about 20 hours in all, to upgrade every worker."""

LEASE_SECONDS = 10.0
"""Seconds after which the lease of a silent run is free for a message delivered for the first time.

A run renews its lease several times a second, from its beginning to its end; a silent one is most likely suspended, or
cut off from Redis. The wait can be long: if the run's worker dies, RabbitMQ redelivers its own message."""

TAKE_OVER_SECONDS = 0.6
"""The same for a redelivered message. Short, since its worker may have been killed."""

MAX_WAITS = 3
"""How often a copy of an earlier attempt waits for the later one, which is on record: 155 s in all.

Then it runs, because a purge of the queue may have deleted the later message."""

SAME_WORK_PATIENCE = 1.0
"""Seconds after the beginning of a run in which another task waits for it in its worker, without the engine.

The shortest retry level is far longer than a small task takes. A slot waits at most this long for each such run."""

_ENDS_WORKERS = (
    "it most likely ends its worker; find out why the workers ended (out of memory?), fix that, "
    "then redrive the task"
)


@dataclass(frozen=True)
class Facts:
    """The facts about a delivery before its run.

    `ended` is an earlier result; `recorded_digest` and `cancel_requested` come from the status index.
    `orphaned_runs`: how many runs of this attempt began in a row and neither ended nor were requeued, by the
    status index; None if it did not count this run. `deliveries`: how often the broker delivered this copy before.
    `other_run`: the lease of another run that is in progress, empty if there is none. `past`: a later attempt or
    redrive is on record; `waits`: how often in a row this copy waited for that one. `same_work`: for how many seconds
    the run of another task has computed the same; None if none does.
    """

    task: Task
    digest: str
    type_name: str
    redrives: int
    now: datetime
    ended: Result | None = None
    recorded_digest: str | None = None
    cancel_requested: bool = False
    orphaned_runs: int | None = None
    deliveries: int = 0
    other_run: str = ""
    past: bool = False
    waits: int = 0
    same_work: float | None = None


def before_run(
    facts: Facts,
) -> Run | AlreadyDone | WaitForOtherRun | WaitForSameWork | Cancel | Expire | DeadLetter:
    """Whether to run a delivery, and if not, what else to do with it."""
    task = facts.task
    if task.task_type != facts.type_name:
        return DeadLetter(
            InvalidTask(
                f"the task is of type {task.task_type!r} and came on a queue of type {facts.type_name!r}; "
                f"publish it to exchange 'inference.tasks' with routing key 'task_type.{task.task_type}'",
                code="wrong_queue",
            )
        )
    known = facts.ended.digest if facts.ended is not None else facts.recorded_digest
    if known is not None and known != facts.digest:
        # Another task has this id, and the record is that task's.
        return id_conflict(task)
    # A failure without a digest belongs to an unreadable message with this id, not to this task.
    if (
        known is not None
        and facts.ended is not None
        and (facts.ended.status == "succeeded" or facts.ended.redrives >= facts.redrives)
    ):
        return AlreadyDone(facts.ended)
    if facts.other_run:
        # Wait rather than drop the copy: that run may be of another attempt or redrive, or its worker may die. Once the
        # task has ended, the copy is acknowledged. Only the run in progress decides on a cancel or an expiry.
        return WaitForOtherRun(retry_level(1))
    if facts.past:
        # The later attempt decides. Its message exists: it was published before the index got to know it.
        return WaitForOtherRun(retry_level(facts.waits + 1), facts.waits + 1)
    if facts.cancel_requested:
        return Cancel()
    if task.expires_at is not None and task.expires_at <= facts.now:
        return Expire(
            InvalidTask(
                f"the task expired at {task.expires_at.isoformat()} before it was started", code="expired"
            )
        )
    if facts.same_work is not None:
        # A long run is looked for less often: 1000 tasks may wait for it.
        return WaitForSameWork(retry_level(1 if facts.same_work < retry_level(2) else 2))
    # This copy was delivered `deliveries` times; further runs are those of other copies, which may still run.
    lost = min(facts.orphaned_runs or 0, facts.deliveries)
    if lost >= MAX_ORPHANED_RUNS:
        return DeadLetter(
            InvalidTask(
                f"the task was started {lost} times in a row by workers that then vanished: {_ENDS_WORKERS}",
                code="poison",
            )
        )
    # The index's count of runs is better than the broker's, which may include requeues.
    forgotten = facts.orphaned_runs is None or facts.recorded_digest is None
    if forgotten and facts.deliveries >= MAX_DELIVERIES:
        return DeadLetter(
            InvalidTask(
                f"the task was delivered {facts.deliveries} times and never ended: {_ENDS_WORKERS}",
                code="poison",
            )
        )
    return Run()


def id_conflict(task: Task) -> DeadLetter:
    """The verdict on a task whose id another task has."""
    return DeadLetter(
        InvalidTask(
            f"task_id {task.task_id!r} of tenant {task.tenant!r} already names a task with other content; "
            "choose another id",
            code="id_conflict",
        ),
        record=False,
    )


def after_unreadable(
    error: InvalidTask, *, accepted: bool, version: int, deferrals: int
) -> Defer | DeadLetter:
    """What to do with a message that is no task to this worker.

    `accepted`: another part of inferq has read the task, as its digest shows. The two parts are then of
    different versions, and the task waits for a worker that can read it. `version` is the SCHEMA_VERSION of
    that part. `deferrals` counts how often the task was put off before.
    """
    if not accepted:
        return DeadLetter(error)
    message = (
        f"{error.message}; this worker (message version {SCHEMA_VERSION}) cannot read the task, but the gateway "
        f"or feeder that accepted it could (message version {version}): upgrade the worker and its plug-ins"
    )
    if deferrals >= MAX_DEFERRALS:
        redrive = f"{message}, then redrive the task"
        return DeadLetter(TransientFailure(redrive, code="unsupported_version"))
    return Defer(retry_level(deferrals + 1), TransientFailure(message, code="unsupported_version"))


def after_failure(
    error: InferqError, *, attempt: int, max_attempts: int, engine_deaths: int, engine_died: bool
) -> Retry | DeadLetter:
    """Whether to retry after a failed attempt. `engine_deaths` counts those of earlier attempts.

    A missing input is looked for twice: a proxy or a server that is being replaced answers 404, too.
    """
    looks_again = error.code == "input_not_found" and attempt == 1
    if isinstance(error, InvalidTask) and not looks_again:
        return DeadLetter(error)
    deaths = engine_deaths + engine_died
    if deaths >= MAX_ENGINE_DEATHS:
        return DeadLetter(
            InvalidTask(f"the task ended {deaths} engine processes; the last time: {error}", code="poison")
        )
    if attempt >= max_attempts:
        return DeadLetter(error)
    return Retry(retry_level(attempt), error, deaths)
