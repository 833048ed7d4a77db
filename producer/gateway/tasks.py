"""The routes of tasks: submit, look, list, cancel."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from inferq.producer.gateway.auth import Tenant
from inferq.producer.gateway.body import read_object
from inferq.producer.gateway.events import wait_for_end
from inferq.producer.gateway.lookup import (
    checked_id,
    find_result,
    find_status,
    queued_line,
    require_status,
    unknown,
)
from inferq.producer.gateway.prefer import applied, wait_seconds
from inferq.producer.gateway.problems import Refused
from inferq.producer.gateway.services import Here, Services, task_path
from inferq.producer.gateway.submission import Submitter, complete
from inferq.schemas import MAX_BODY_BYTES, Outage, Result, State, TaskId, TaskStatus
from inferq.schemas.task import TypeName
from inferq.storage.status.index import StatusOutage

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

router = APIRouter(prefix="/v1", tags=["tasks"])


class Links(BaseModel):
    """Where to go on from a task: paths on the same gateway."""

    model_config = ConfigDict(frozen=True)

    self: str
    result: str
    events: str
    cancel: str


class TaskAnswer(TaskStatus):
    """Where a task stands, and its links. `result` only where the request waited for the task's end."""

    links: Links
    result: Result | None = None


class TaskPage(BaseModel):
    """Some tasks, the newest first. `next` is the path of the page after, none on the last."""

    model_config = ConfigDict(frozen=True)

    items: tuple[TaskStatus, ...]
    cursor: str | None
    next: str | None


@router.post(
    "/tasks",
    status_code=202,
    response_model=TaskAnswer,
    summary="Submit a task",
    responses={200: {"model": TaskAnswer, "description": "The task has ended already"}},
)
async def post_task(request: Request, tenant: Tenant, services: Here) -> Response:
    """Answers once the broker has confirmed the task. `Prefer: wait=20` waits up to that many seconds (at
    most 60) for its end.
    """
    return await _submit(request, services, tenant, None)


@router.put(
    "/tasks/{task_id}",
    status_code=202,
    response_model=TaskAnswer,
    summary="Submit a task under an id of one's own",
    responses={200: {"model": TaskAnswer, "description": "The task has ended already"}},
)
async def put_task(task_id: str, request: Request, tenant: Tenant, services: Here) -> Response:
    """The same id is the same task: putting it twice runs it once; with another content it is refused."""
    return await _submit(request, services, tenant, task_id)


async def _submit(request: Request, services: Services, tenant: str, task_id: str | None) -> Response:
    document = await read_object(request, limit=MAX_BODY_BYTES, seconds=services.settings.body_timeout)
    task = complete(document, tenant=tenant, task_id=task_id)
    submitter: Submitter = request.app.state.submitter
    traceparent = request.headers.get("traceparent", "")
    status = await submitter.submit(
        task,
        own_id="task_id" in document or task_id is not None,
        traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else None,
    )
    seconds = wait_seconds(request.headers.getlist("prefer"))
    if seconds and not status.ended:
        status = await _waited(services, status, seconds)
    result = await _result_if_known(services, status) if seconds is not None and status.ended else None
    headers = {"Location": task_path(task.task_id), **applied(seconds)}
    return _answer(status, code=200 if status.ended else 202, result=result, headers=headers)


async def _waited(services: Services, status: TaskStatus, seconds: float) -> TaskStatus:
    try:
        return await wait_for_end(services, status.tenant, status.task_id, seconds) or status
    except Outage:
        return status  # it is accepted, whoever is away; the client asks again


async def _result_if_known(services: Services, status: TaskStatus) -> Result | None:
    try:
        result = await find_result(services, status.tenant, status.task_id)
    except Outage:
        return None
    return None if result is None else with_public_urls(services, result)


@router.get("/tasks/{task_id}", response_model=TaskAnswer, summary="Where a task stands")
async def get_task(task_id: str, request: Request, tenant: Tenant, services: Here) -> Response:
    """`Prefer: wait=20` waits up to that many seconds (at most 60) for its end."""
    status = await require_status(services, tenant, task_id)
    seconds = wait_seconds(request.headers.getlist("prefer"))
    if seconds and not status.ended:
        status = await _waited(services, status, seconds)
    return _answer(status, headers=applied(seconds))


@router.get(
    "/tasks/{task_id}/result",
    response_model=Result,
    summary="How a task ended",
    responses={409: {"description": "The task has not ended (`not_ended`)"}},
)
async def get_result(task_id: str, request: Request, tenant: Tenant, services: Here) -> Response:
    """Its output and artifacts, or the error that it ended with. `Prefer: wait=20` waits for its end."""
    checked_id(task_id)
    seconds = wait_seconds(request.headers.getlist("prefer"))
    result = await find_result(services, tenant, task_id)
    if result is None and seconds:
        await wait_for_end(services, tenant, task_id, seconds)
        result = await find_result(services, tenant, task_id)
    if result is not None:
        public = with_public_urls(services, result)
        return Response(public.model_dump_json(), headers=applied(seconds), media_type="application/json")
    status = await find_status(services, tenant, task_id)
    if status is None:
        raise unknown(task_id)
    raise Refused(
        409,
        "not_ended",
        f"task {task_id!r} is {status.state}: it has no result yet",
        headers={"Retry-After": "1", **applied(seconds)},
        about={"task_id": task_id, "state": status.state},
    )


@router.post(
    "/tasks/{task_id}/cancel",
    status_code=202,
    response_model=TaskAnswer,
    summary="Cancel a task",
    responses={
        200: {"model": TaskAnswer, "description": "It is cancelled already"},
        409: {"description": "It has ended otherwise (`already_ended`)"},
    },
)
async def cancel_task(task_id: str, tenant: Tenant, services: Here) -> Response:
    """A queued task never starts; a running one stops within a second or so."""
    checked_id(task_id)
    outage: StatusOutage | None = None
    status: TaskStatus | None = None
    try:
        status = await services.on_redis(services.status.request_cancel, tenant, task_id)
    except StatusOutage as error:
        outage = error
    if status is None:
        result = await find_result(services, tenant, task_id)
        status = TaskStatus.of_result(result) if result is not None else None
        if status is None and outage is None:
            status = await _cancelled_line(services, tenant, task_id)
        if status is None:
            raise outage or unknown(task_id)
    if not status.ended:
        return _answer(status, code=202)
    if status.state == "cancelled":
        return _answer(status)
    raise Refused(
        409,
        "already_ended",
        f"task {task_id!r} has {status.state}: there is nothing to cancel",
        about={"task_id": task_id, "state": status.state},
    )


async def _cancelled_line(services: Services, tenant: str, task_id: str) -> TaskStatus | None:
    """Have a batch's line cancelled that waits in the queue; None where it is no such."""
    status = await queued_line(services, tenant, task_id)
    if status is None or status.batch_id is None:
        return None
    line = int(task_id.rpartition(".")[2])
    await services.on_redis(services.batch_index.request_cancel, tenant, status.batch_id, line=line)
    return status.model_copy(update={"cancel_requested": True})


@router.get("/tasks", response_model=TaskPage, summary="List tasks, the newest first")
async def list_tasks(
    tenant: Tenant,
    services: Here,
    task_type: Annotated[TypeName | None, Query()] = None,
    status: Annotated[State | None, Query()] = None,
    batch_id: Annotated[TaskId | None, Query()] = None,
    cursor: Annotated[str | None, Query(max_length=512)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """Tasks of the last days, as far as the status index keeps them.

    Of a batch it keeps those that run or wait for a retry, and queued ones where lines name ids; what has
    ended is in the batch's output and errors.
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
    given = urlencode({name: value for name, value in query.items() if value is not None})
    following = f"/v1/tasks?{given}" if page.cursor else None
    answer = TaskPage(items=page.items, cursor=page.cursor, next=following)
    headers = {"Link": f'<{following}>; rel="next"'} if following else {}
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


def with_public_urls(services: Services, result: Result) -> Result:
    """The result, its artifacts' URLs such that the tenant can get them from the gateway."""
    base = f"{services.task_url(result.task_id)}/artifacts"
    artifacts = tuple(
        artifact.model_copy(update={"url": f"{base}/{quote(artifact.name, safe='')}"})
        for artifact in result.artifacts
    )
    return result.model_copy(update={"artifacts": artifacts})


def _answer(
    status: TaskStatus,
    *,
    code: int = 200,
    result: Result | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    path = task_path(status.task_id)
    links = Links(self=path, result=f"{path}/result", events=f"{path}/events", cancel=f"{path}/cancel")
    # Built without validation: a status has been validated where it was read.
    answer = TaskAnswer.model_construct(**dict(status), links=links, result=result)
    body = answer.model_dump_json(exclude=None if result is not None else {"result"})
    return Response(body, code, headers, "application/json")
