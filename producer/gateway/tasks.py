"""The routes of tasks: submit, status, result, list, cancel."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from structlog.contextvars import bind_contextvars

from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.body import read_json
from inferq.producer.gateway.events import wait_for_end
from inferq.producer.gateway.paths import Paths
from inferq.producer.gateway.prefer import WAITS, preference_applied, wait_seconds
from inferq.producer.gateway.problems import ProblemError
from inferq.producer.gateway.ranges import requested_part
from inferq.producer.gateway.responses import page_path, page_response
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.producer.gateway.submission import Submitter
from inferq.producer.gateway.task_lookup import (
    checked_task_id,
    find_result,
    find_status,
    no_such_task,
    queued_line,
    require_status,
)
from inferq.producer.gateway.task_request import requested_task
from inferq.schemas import MAX_BODY_BYTES, Outage, Result, State, TaskId, TaskStatus, tracing
from inferq.schemas.task import TypeName
from inferq.schemas.trace_context import trace_context
from inferq.storage.status.fields import CURSOR_PATTERN
from inferq.storage.status.index import StatusOutage

router = Router(prefix="/v1", tags=["tasks"])


class Links(BaseModel):
    """Paths of the task on the same gateway."""

    model_config = ConfigDict(frozen=True)

    self: str
    result: str
    events: str
    cancel: str


class TaskAnswer(TaskStatus):
    """A task's status and links. `result` is present only if the request waited and the task has ended."""

    links: Links
    result: Result | None = None


class TaskPage(BaseModel):
    """A page of tasks, newest first. `next` is the path of the next page, null on the last one."""

    model_config = ConfigDict(frozen=True)

    items: tuple[TaskStatus, ...]
    cursor: str | None
    next: str | None


@router.post(
    "/tasks",
    status_code=202,
    response_model=TaskAnswer,
    summary="Submit a task",
    openapi_extra=WAITS,
    responses={200: {"model": TaskAnswer, "description": "The task has ended"}},
)
async def post_task(request: Request, tenant: CurrentTenant, services: ServicesDep) -> Response:
    """Answers once the broker has confirmed the task.

    With `Prefer: wait=20` the answer waits up to 20 seconds (at most 60) for the task's end.
    """
    return await _submit(request, services, tenant, None)


@router.put(
    "/tasks/{task_id}",
    status_code=202,
    response_model=TaskAnswer,
    summary="Submit a task under an id of your choice",
    openapi_extra=WAITS,
    responses={200: {"model": TaskAnswer, "description": "The task has ended"}},
)
async def put_task(task_id: str, request: Request, tenant: CurrentTenant, services: ServicesDep) -> Response:
    """The same id is the same task: submitted twice, it runs once. Other content answers 409 (`id_conflict`)."""
    return await _submit(request, services, tenant, task_id)


async def _submit(request: Request, services: Services, tenant: str, task_id: str | None) -> Response:
    document = await read_json(request, limit=MAX_BODY_BYTES, seconds=services.settings.body_timeout)
    task = requested_task(document, tenant=tenant, task_id=task_id)
    bind_contextvars(task_id=task.task_id, task_type=task.task_type)
    submitter: Submitter = request.app.state.submitter
    status = await submitter.submit(
        task,
        own_id="task_id" in document or task_id is not None,
        trace=tracing.current().context or trace_context(request.headers),
    )
    seconds = wait_seconds(request.headers.getlist("prefer"))
    if seconds and not status.ended:
        status = await _status_after_wait(services, status, seconds)
    result = await _result_if_known(services, status) if seconds is not None and status.ended else None
    headers = {"Location": services.paths.task(task.task_id), **preference_applied(seconds)}
    return _answer(services.paths, status, code=200 if status.ended else 202, result=result, headers=headers)


async def _status_after_wait(services: Services, status: TaskStatus, seconds: float) -> TaskStatus:
    try:
        return await wait_for_end(services, status.tenant, status.task_id, seconds) or status
    except Outage:
        return status  # the task is accepted; the client can ask again


async def _result_if_known(services: Services, status: TaskStatus) -> Result | None:
    try:
        result = await find_result(services, status.tenant, status.task_id)
    except Outage:
        return None
    return None if result is None else with_public_urls(services, result)


@router.get("/tasks/{task_id}", response_model=TaskAnswer, summary="Get a task's status", openapi_extra=WAITS)
async def get_task(task_id: str, request: Request, tenant: CurrentTenant, services: ServicesDep) -> Response:
    """With `Prefer: wait=20` the answer waits up to 20 seconds (at most 60) for the task's end."""
    status = await require_status(services, tenant, task_id)
    seconds = wait_seconds(request.headers.getlist("prefer"))
    if seconds and not status.ended:
        status = await _status_after_wait(services, status, seconds)
    return _answer(services.paths, status, headers=preference_applied(seconds))


@router.get(
    "/tasks/{task_id}/result",
    response_model=Result,
    summary="Get a task's result",
    openapi_extra=WAITS,
    responses={409: {"description": "The task has not ended yet (`not_ended`)"}},
)
async def get_result(
    task_id: str, request: Request, tenant: CurrentTenant, services: ServicesDep
) -> Response:
    """The task's output and artifacts, or its error.

    With `Prefer: wait=20` the answer waits up to 20 seconds (at most 60) for the task's end.
    """
    checked_task_id(task_id)
    seconds = wait_seconds(request.headers.getlist("prefer"))
    result = await find_result(services, tenant, task_id)
    if result is None and seconds:
        await wait_for_end(services, tenant, task_id, seconds)
        result = await find_result(services, tenant, task_id)
    if result is not None:
        body = with_public_urls(services, result).model_dump_json().encode()
        part = requested_part(request, size=len(body), etag=f'"{hashlib.sha256(body).hexdigest()}"')
        headers = {**part.headers, **preference_applied(seconds)}
        return Response(
            body[part.bytes.start : part.bytes.stop], part.status, headers, media_type="application/json"
        )
    status = await find_status(services, tenant, task_id)
    if status is None:
        raise no_such_task(task_id)
    raise ProblemError(
        409,
        "not_ended",
        f"task {task_id!r} is {status.state} and has no result yet; ask again, or wait with Prefer: wait=20",
        headers={"Retry-After": "1", **preference_applied(seconds)},
        extensions={"task_id": task_id, "state": status.state},
    )


@router.post(
    "/tasks/{task_id}/cancel",
    status_code=202,
    response_model=TaskAnswer,
    summary="Cancel a task",
    responses={
        200: {"model": TaskAnswer, "description": "The task was cancelled before"},
        409: {"description": "The task has succeeded or failed (`already_ended`)"},
    },
)
async def cancel_task(task_id: str, tenant: CurrentTenant, services: ServicesDep) -> Response:
    """A queued task does not start. A running task stops within about a second.

    404 if the gateway does not know the task. If it waits in a queue nevertheless, it does not start either.
    """
    checked_task_id(task_id)
    outage: StatusOutage | None = None
    status: TaskStatus | None = None
    try:
        await services.record_accepted(tenant, task_id)
        status = await services.on_redis(services.status.request_cancel, tenant, task_id)
    except StatusOutage as error:
        outage = error
    if status is None:
        result = await find_result(services, tenant, task_id)
        status = TaskStatus.of_result(result) if result is not None else None
        if status is None and outage is None:
            status = await _cancel_queued_line(services, tenant, task_id)
        if status is None:
            raise outage or no_such_task(task_id)
    if not status.ended:
        return _answer(services.paths, status, code=202)
    if status.state == "cancelled":
        return _answer(services.paths, status)
    raise ProblemError(
        409,
        "already_ended",
        f"task {task_id!r} has already {status.state}; it cannot be cancelled",
        extensions={"task_id": task_id, "state": status.state},
    )


async def _cancel_queued_line(services: Services, tenant: str, task_id: str) -> TaskStatus | None:
    """Cancel a queued line of a batch; None if the task is not one."""
    status = await queued_line(services, tenant, task_id)
    if status is None or status.batch_id is None:
        return None
    line = int(task_id.rpartition(".")[2])
    await services.on_redis(services.batch_index.request_cancel, tenant, status.batch_id, line=line)
    return status.model_copy(update={"cancel_requested": True})


@router.get("/tasks", response_model=TaskPage, summary="List tasks, newest first")
async def list_tasks(
    tenant: CurrentTenant,
    services: ServicesDep,
    task_type: Annotated[TypeName | None, Query()] = None,
    status: Annotated[State | None, Query()] = None,
    batch_id: Annotated[TaskId | None, Query()] = None,
    cursor: Annotated[str | None, Query(min_length=1, json_schema_extra={"pattern": CURSOR_PATTERN})] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """Recent tasks: those that the status index still holds.

    Of a batch it holds running and retrying tasks, and queued ones if the batch's lines name their ids. Ended
    ones are in the batch's output and errors.
    """
    page = await services.on_redis(
        services.status.list,
        tenant,
        task_type=task_type,
        state=status,
        batch_id=batch_id,
        cursor=cursor,
        limit=limit,
    )
    query = {
        "task_type": task_type,
        "status": status,
        "batch_id": batch_id,
        "cursor": page.cursor,
        "limit": limit,
    }
    next_path = page_path(services.paths.tasks, query)
    return page_response(TaskPage(items=page.items, cursor=page.cursor, next=next_path), next_path)


def with_public_urls(services: Services, result: Result) -> Result:
    """The result, with URLs of its artifacts on the gateway."""
    artifacts = tuple(
        artifact.model_copy(update={"url": services.paths.artifact_url(result.task_id, artifact.name)})
        for artifact in result.artifacts
    )
    return result.model_copy(update={"artifacts": artifacts})


def _answer(
    paths: Paths,
    status: TaskStatus,
    *,
    code: int = 200,
    result: Result | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    path = paths.task(status.task_id)
    links = Links(self=path, result=f"{path}/result", events=f"{path}/events", cancel=f"{path}/cancel")
    # Without validation: the status was validated when it was read.
    answer = TaskAnswer.model_construct(**dict(status), links=links, result=result)
    body = answer.model_dump_json(exclude=None if result is not None else {"result"})
    return Response(body, code, headers, "application/json")
