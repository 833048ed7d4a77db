"""Where a task stands: asked of Redis first, and of the object store wherever Redis does not know."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

from pydantic import TypeAdapter, ValidationError

from inferq.producer.gateway.problems import not_found
from inferq.producer.gateway.services import Services
from inferq.schemas import (
    EVENT_OF_STATE,
    Event,
    EventData,
    InferqError,
    Outage,
    Result,
    TaskId,
    TaskStatus,
    sequence_of,
)
from inferq.storage.status.index import StatusOutage

_LINE_DIGITS = 9
_DOUBTED_AFTER = timedelta(seconds=60)
_TASK_ID: TypeAdapter[str] = TypeAdapter(TaskId)

_log = logging.getLogger(__name__)


def checked_id(task_id: str) -> str:
    """`task_id` itself. Raises Refused (404) for one that no task can have."""
    try:
        return _TASK_ID.validate_python(task_id)
    except ValidationError as error:
        raise unknown(task_id) from error


def unknown(task_id: str) -> InferqError:
    return not_found(f"task {task_id!r}")


async def find_result(services: Services, tenant: str, task_id: str) -> Result | None:
    """The record of how the task ended, None where it has not. Raises StoreOutage."""
    return await services.on_store(services.results.load, tenant, task_id)


async def find_status(
    services: Services, tenant: str, task_id: str, *, doubt: bool = False
) -> TaskStatus | None:
    """Where the task stands; None where nobody knows it.

    Redis is an index that may have missed an end, so one that it has long called unfinished (or, with
    `doubt`, that it calls unfinished at all) is looked for in the object store too. Raises an Outage where
    whoever would know is away.
    """
    outage: Outage | None = None
    status: TaskStatus | None = None
    try:
        status = await services.on_redis(services.status.get, tenant, task_id)
    except StatusOutage as error:
        outage = error
    if status is not None and (status.ended or not (doubt or _doubtful(status))):
        return status
    try:
        if status is None:
            result = await find_result(services, tenant, task_id)
        else:
            result = await services.glance(services.results.load, tenant, task_id)
    except Outage:
        if status is None:
            raise
        return status
    if result is None:
        if status is None and outage is not None:
            raise outage
        return status or await queued_line(services, tenant, task_id)
    return TaskStatus.of_result(result) if status is None else await _mended(services, status, result)


async def queued_line(services: Services, tenant: str, task_id: str) -> TaskStatus | None:
    """The status of a task that is a batch's line, and waits in the queue: of such there is no record.

    None for everything else. Where lines name ids, those that are queued have records.
    """
    batch_id, dot, number = task_id.rpartition(".")
    if not dot or not number.isdecimal() or len(number) > _LINE_DIGITS or number.startswith("0"):
        return None
    line = int(number)
    if not await services.on_redis(services.batch_index.is_fed, tenant, batch_id, line):
        return None
    batch = await services.on_store(services.batches.load, tenant, batch_id)
    source = await services.on_store(services.batches.source, tenant, batch_id)
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
    """Where the task stands. Raises Refused (404) where there is no such task."""
    status = await find_status(services, tenant, checked_id(task_id))
    if status is None:
        raise unknown(task_id)
    return status


def event_of_status(status: TaskStatus) -> Event:
    """The event that tells a newcomer where the task stands."""
    type_ = EVENT_OF_STATE[status.state]
    if status.state == "running" and status.progress is not None:
        type_ = "task.progress"
    return Event(
        type=type_,
        timestamp=status.finished_at or datetime.now(UTC),
        data=EventData(
            task_id=status.task_id,
            task_type=status.task_type,
            tenant=status.tenant,
            state=status.state,
            attempt=status.attempt,
            sequence=sequence_of(
                status.state,
                attempt=status.attempt,
                redrives=status.redrives,
                progress=status.progress,
            ),
            progress=status.progress,
            note=status.progress_note,
            batch_id=status.batch_id,
            error=status.error,
        ),
    )


def _doubtful(status: TaskStatus) -> bool:
    since = status.started_at or status.created_at
    return since is None or datetime.now(UTC) - since > _DOUBTED_AFTER


async def _mended(services: Services, status: TaskStatus, result: Result) -> TaskStatus:
    """Tell Redis of an end that it missed, so that lists and waiting readers learn of it too.

    A failure changes nothing where the task has been redriven since: then Redis knows better.
    """
    try:
        await services.on_redis(services.status.ended, result)
        return await services.on_redis(
            services.status.get, result.tenant, result.task_id
        ) or TaskStatus.of_result(result)
    except StatusOutage as error:
        _log.warning("task %s: its end is not in Redis: %s", result.task_id, error)
        return TaskStatus.of_result(result) if result.status == "succeeded" else status
