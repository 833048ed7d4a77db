"""What to do next with a delivery: pure functions from what is known to a decision.

Nothing here touches the broker, the store or the engine, so every case can be tried without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from inferq.broker import retry_level
from inferq.schemas import InferqError, InvalidTask, Result, Task

MAX_ENGINE_DEATHS = 3
"""A task that has taken down this many engine processes is poison."""


@dataclass(frozen=True)
class Run:
    """Compute it."""


@dataclass(frozen=True)
class AlreadyDone:
    """It has ended already, as `ended` says; there is nothing left to do but to acknowledge."""

    ended: Result


@dataclass(frozen=True)
class Cancel:
    """Its owner has cancelled it: record that, without a run."""


@dataclass(frozen=True)
class Expire:
    """It is no longer worth starting: record that, without a run."""

    error: InferqError


@dataclass(frozen=True)
class Retry:
    """Try again `seconds` from now, as the next attempt."""

    seconds: int
    error: InferqError
    engine_deaths: int


@dataclass(frozen=True)
class DeadLetter:
    """It cannot be done: dead-letter it for `error`. `record`: whether its owner's record ends with it."""

    error: InferqError
    record: bool = True


MAX_ORPHANED_RUNS = 5
"""A task whose runs vanished this often in a row, with their workers, most likely takes its worker down.

It is above MAX_ENGINE_DEATHS, because workers also go for reasons that are not the task's (a node lost, a
machine out of memory), and well below MAX_DELIVERIES, because every further try costs everybody a worker."""

MAX_DELIVERIES = 25
"""The same, by the broker's count, where Redis has forgotten its own. It is well above what giving back
counts, which RabbitMQ before 4.3 counts too, and well below the broker's own limit."""

_TAKES_DOWN = (
    "it most likely takes its worker down; see why the workers ended (out of memory?), mend it, then redrive"
)


@dataclass(frozen=True)
class Facts:
    """What is known of a delivery before its run.

    `lost_runs`: how many runs of this attempt began in a row and came to no orderly end, by the status index;
    None where it does not count this one.
    `deliveries`: how often the broker handed this copy out before.
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


def before_run(facts: Facts) -> Run | AlreadyDone | Cancel | Expire | DeadLetter:
    """Whether to run a delivery, and if not, why not."""
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
        # The id belongs to the other task, and so does its record.
        return id_conflict(task)
    # A failure without a digest is that of an unreadable message with this id, not of this task.
    if (
        known is not None
        and facts.ended is not None
        and (facts.ended.status == "succeeded" or facts.ended.redrives >= facts.redrives)
    ):
        return AlreadyDone(facts.ended)
    if facts.cancel_requested:
        return Cancel()
    if task.expires_at is not None and task.expires_at <= facts.now:
        return Expire(
            InvalidTask(
                f"the task expired at {task.expires_at.isoformat()} before it was started", code="expired"
            )
        )
    # More runs than this copy was handed out for are those of other copies, which may be running still.
    lost = min(facts.orphaned_runs or 0, facts.deliveries)
    if lost >= MAX_ORPHANED_RUNS:
        return DeadLetter(
            InvalidTask(
                f"the task was begun {lost} times in a row by workers that then vanished: {_TAKES_DOWN}",
                code="poison",
            )
        )
    # Whoever has counted the runs knows better than the broker, which may count what was given back.
    forgotten = facts.orphaned_runs is None or facts.recorded_digest is None
    if forgotten and facts.deliveries >= MAX_DELIVERIES:
        return DeadLetter(
            InvalidTask(
                f"the task was handed out {facts.deliveries} times and came to no end: {_TAKES_DOWN}",
                code="poison",
            )
        )
    return Run()


def id_conflict(task: Task) -> DeadLetter:
    """What becomes of a task whose id another one has."""
    return DeadLetter(
        InvalidTask(
            f"task_id {task.task_id!r} of tenant {task.tenant!r} already names a task with other content; "
            "choose another id",
            code="id_conflict",
        ),
        record=False,
    )


def after_failure(
    error: InferqError, *, attempt: int, max_attempts: int, engine_deaths: int, engine_died: bool
) -> Retry | DeadLetter:
    """Whether a failed attempt is followed by another. `engine_deaths` counts those of earlier attempts."""
    if isinstance(error, InvalidTask):
        return DeadLetter(error)
    deaths = engine_deaths + engine_died
    if deaths >= MAX_ENGINE_DEATHS:
        return DeadLetter(
            InvalidTask(
                f"the task has ended {deaths} engine processes; the last time: {error}", code="poison"
            )
        )
    if attempt >= max_attempts:
        return DeadLetter(error)
    return Retry(retry_level(attempt), error, deaths)
