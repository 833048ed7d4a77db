"""Whether to publish a submitted task: a pure function from facts to a decision.

Nothing here touches Redis, the object store or the broker, so every case can be tested without them.
`task_request` has checked the task's content before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from inferq.producer.gateway.problems import ProblemError, problem_of, unknown_file
from inferq.schemas import InvalidTask, Result, Task, TaskStatus
from inferq.storage.objects.store import ObjectNotFound
from inferq.storage.status.index import Submission

_FRESH = timedelta(hours=1)


@dataclass(frozen=True)
class Publish:
    """Publish the task. `status` is the answer once the broker has confirmed it."""

    status: TaskStatus


@dataclass(frozen=True)
class AlreadyAccepted:
    """The same task was accepted before: answer with its status and publish nothing."""

    status: TaskStatus


@dataclass(frozen=True)
class Refuse:
    """Answer with a problem and publish nothing."""

    problem: ProblemError


@dataclass(frozen=True)
class UnusableInput:
    """An input that names an upload by a malformed id (InvalidTask), or one that does not exist."""

    field: str
    url: str
    error: InvalidTask | ObjectNotFound


@dataclass(frozen=True)
class Facts:
    """What the gateway knows of a submission before it publishes.

    `record`: Redis' record of the id, made by this submission if there was none; None if Redis is unavailable.
    `accepted`: the digest of the task that this gateway accepted under the id while Redis was unavailable.
    `result`: how a task of this id ended, from the object store. None also if the store was not asked or is
    unavailable: the worker checks again before a run.
    `is_queued_line`: whether the id belongs to a line of a batch that waits in its queue.
    `unusable_inputs`: in the order of the task's fields.
    `trace_id`: the trace of the submission.
    """

    task: Task
    digest: str
    record: Submission | None = None
    accepted: str | None = None
    result: Result | None = None
    is_queued_line: bool = False
    unusable_inputs: tuple[UnusableInput, ...] = ()
    trace_id: str | None = None

    @property
    def record_decides(self) -> bool:
        """Whether Redis' record alone decides, so that the other facts need not be gathered."""
        record = self.record
        return record is not None and (record.conflict or (record.confirmed and not record.new))


def admit(facts: Facts) -> Publish | AlreadyAccepted | Refuse:
    """Whether to publish a task. An id in use comes before unusable inputs."""
    task, record = facts.task, facts.record
    if record is not None and record.conflict:
        return Refuse(id_conflict(task))
    if record is not None and facts.record_decides:
        return AlreadyAccepted(record.status)
    # A result without a digest is that of an unreadable message, which stands for no task.
    if facts.result is not None and facts.result.digest is not None:
        if facts.result.digest != facts.digest:
            return Refuse(id_conflict(task))
        return AlreadyAccepted(TaskStatus.of_result(facts.result))
    if record is None and facts.accepted is not None:
        return AlreadyAccepted(_queued(task)) if facts.accepted == facts.digest else Refuse(id_conflict(task))
    if facts.is_queued_line:
        return Refuse(id_conflict(task))
    for unusable in facts.unusable_inputs:
        if isinstance(unusable.error, InvalidTask):
            return Refuse(problem_of(unusable.error))
        return Refuse(unknown_file(unusable.field, unusable.url))
    return Publish(record.status if record is not None else _queued(task, facts.trace_id))


def may_be_in_use(task_id: str, now: datetime) -> bool:
    """Whether a task of this id may have existed without Redis knowing it still.

    False for a UUID of version 7 made within the last hour: Redis keeps records for longer.
    """
    try:
        made = UUID(task_id)
    except ValueError:
        return True
    if made.version != 7:
        return True
    seconds = (made.int >> 80) / 1000
    return abs(now.timestamp() - seconds) >= _FRESH.total_seconds()


def id_conflict(task: Task) -> ProblemError:
    """The problem (409) of an id that another task has."""
    return ProblemError(
        409,
        "id_conflict",
        f"task {task.task_id!r} already exists with different content; choose another id",
        extensions={"task_id": task.task_id},
    )


def _queued(task: Task, trace_id: str | None = None) -> TaskStatus:
    return TaskStatus(
        task_id=task.task_id,
        task_type=task.task_type,
        tenant=task.tenant,
        state="queued",
        priority=task.priority,
        batch_id=task.batch_id,
        created_at=task.created_at,
        trace_id=trace_id,
    )
