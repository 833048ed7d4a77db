"""A task's status: from Redis, and from the object store if Redis does not know or may be out of date."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from pydantic import TypeAdapter, ValidationError

from inferq.producer.gateway.problems import ProblemError, not_found
from inferq.producer.gateway.services import Services
from inferq.schemas import (
    EVENT_OF_STATE,
    ErrorInfo,
    Event,
    EventData,
    InvalidTask,
    Outage,
    Result,
    TaskId,
    TaskStatus,
)
from inferq.storage.objects.results import UnreadableResult
from inferq.storage.status.index import StatusOutage

_MAX_LINE_DIGITS = 9
_STALE_AFTER = timedelta(seconds=60)
_UNTAKEN_SECONDS = 30.0
"""Seconds after which a cancel that no worker has taken is recorded here."""
_TASK_ID: TypeAdapter[str] = TypeAdapter(TaskId)

_log = logging.getLogger(__name__)


def checked_task_id(task_id: str) -> str:
    """`task_id` itself. Raises ProblemError (404) if it is not a valid id, so that no task can have it."""
    try:
        return _TASK_ID.validate_python(task_id)
    except ValidationError as error:
        raise no_such_task(task_id) from error


def no_such_task(task_id: str) -> ProblemError:
    """The problem (404) of a task that does not exist."""
    return not_found(f"task {task_id!r}")


async def find_result(services: Services, tenant: str, task_id: str) -> Result | None:
    """The task's result; None if it has not ended. Raises StoreOutage."""
    return await services.on_store(services.results.load, tenant, task_id)


async def find_status(
    services: Services, tenant: str, task_id: str, *, recheck: bool = False
) -> TaskStatus | None:
    """The task's status; None if there is no such task.

    Redis is an index and may have missed the task's end. If it has called the task unfinished for a minute
    (with `recheck`: if it calls it unfinished at all), the object store is asked too. Raises Outage if the
    service that would know is unavailable.
    """
    outage: Outage | None = None
    status: TaskStatus | None = None
    try:
        await services.record_accepted(tenant, task_id)
        status = await services.on_redis(services.status.get, tenant, task_id)
    except StatusOutage as error:
        outage = error
    if status is not None and (status.ended or not (recheck or _may_be_stale(status))):
        return status
    try:
        if status is None:
            result = await find_result(services, tenant, task_id)
        else:
            result = await services.try_store(services.results.load, tenant, task_id)
    except Outage:
        if status is None:
            raise
        return status
    if result is None:
        if status is None and outage is not None:
            raise outage
        if status is None:
            return await queued_line(services, tenant, task_id)
        return await _without_message(services, status)
    return TaskStatus.of_result(result) if status is None else await _repaired(services, status, result)


async def queued_line(services: Services, tenant: str, task_id: str) -> TaskStatus | None:
    """The status of a batch's line that waits in the queue: Redis has no record of it.

    None for any other task. Lines that name their own ids have records.
    """
    batch_id, dot, number = task_id.rpartition(".")
    if not dot or not number.isdecimal() or len(number) > _MAX_LINE_DIGITS or number.startswith("0"):
        return None
    line = int(number)
    if not await services.on_redis(services.batch_index.is_fed, tenant, batch_id, line):
        return None
    batch, source = await asyncio.gather(
        services.on_store(services.batches.load, tenant, batch_id),
        services.on_store(services.batches.source, tenant, batch_id),
    )
    if batch is None or source is None or source.own_ids:
        return None
    return TaskStatus(
        task_id=task_id,
        task_type=batch.task_type or "",
        tenant=tenant,
        state="queued",
        priority=batch.priority,
        batch_id=batch_id,
        created_at=batch.created_at,
    )


async def require_status(services: Services, tenant: str, task_id: str) -> TaskStatus:
    """The task's status. Raises ProblemError (404) if there is no such task."""
    status = await find_status(services, tenant, checked_task_id(task_id))
    if status is None:
        raise no_such_task(task_id)
    return status


def event_of_status(status: TaskStatus) -> Event:
    """The event that gives a new reader the task's status."""
    type_ = EVENT_OF_STATE[status.state]
    if status.state == "running" and status.progress is not None:
        type_ = "task.progress"
    return Event(
        type=type_,
        timestamp=status.finished_at or datetime.now(UTC),
        data=EventData.of(
            status,
            status.state,
            attempt=status.attempt,
            redrives=status.redrives,
            progress=status.progress,
            note=status.progress_note,
            error=status.error,
        ),
    )


def _may_be_stale(status: TaskStatus) -> bool:
    # A time in the future is of a wrong clock, and says nothing.
    since = status.started_at or status.created_at
    return since is None or abs(datetime.now(UTC) - since) > _STALE_AFTER


async def _without_message(services: Services, status: TaskStatus) -> TaskStatus:
    """The status after the end of a cancelled task was recorded that no worker takes.

    Its message may be lost, for example by a purge. A worker that gets it after all reports the end. A line of a
    batch is left to the batch's feeder.
    """
    waiting = status.state in ("queued", "retrying") and status.batch_id is None
    if not (waiting and status.cancel_requested):
        return status
    try:
        digest = await services.on_redis(
            services.status.untaken_cancel, status.tenant, status.task_id, _UNTAKEN_SECONDS
        )
        if digest is None:
            return status
        ended = Result(
            task_id=status.task_id,
            task_type=status.task_type,
            tenant=status.tenant,
            status="cancelled",
            attempts=status.attempt - (status.state == "queued"),
            error=ErrorInfo.of(InvalidTask("the task was cancelled before it was started", code="cancelled")),
            created_at=status.created_at,
            finished_at=datetime.now(UTC),
            digest=digest,
            redrives=status.redrives,
            trace_id=status.trace_id,
        )
        kept = await services.try_store(services.results.save, ended)
        if kept is ended:
            services.metrics.cancelled(ended.task_type)
    except (Outage, UnreadableResult) as error:
        _log.warning("task %s: its cancel could not be recorded: %s", status.task_id, error)
        return status
    return await _repaired(services, status, kept)


async def _repaired(services: Services, status: TaskStatus, result: Result) -> TaskStatus:
    """The status after Redis was updated with an end that it missed, for lists and waiting readers too.

    Redis ignores a failure if the task was redriven since.
    """
    try:
        await services.on_redis(services.status.ended, result)
        return await services.on_redis(
            services.status.get, result.tenant, result.task_id
        ) or TaskStatus.of_result(result)
    except StatusOutage as error:
        _log.warning("task %s: its end could not be recorded in Redis: %s", result.task_id, error)
        return TaskStatus.of_result(result) if result.status == "succeeded" else status
