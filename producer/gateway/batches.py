"""The routes of batches: submit, status, list, cancel, output and errors."""

from __future__ import annotations

import logging
import secrets
from contextlib import aclosing
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from python_multipart.multipart import parse_options_header
from structlog.contextvars import bind_contextvars

from inferq.broker import feed_message
from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.batch_lookup import find_batch, require_batch, status_of
from inferq.producer.gateway.batch_request import SEND_JSONL_AS, requested_batch
from inferq.producer.gateway.batch_submission import submit_batch
from inferq.producer.gateway.body import body_chunks, decode_json, read_json
from inferq.producer.gateway.files import SENT_FILE, EmptyUpload, as_file, download, store_upload
from inferq.producer.gateway.paths import Paths
from inferq.producer.gateway.problems import ProblemError
from inferq.producer.gateway.responses import json_response, page_path, page_response
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.schemas import MAX_BODY_BYTES, BatchStatus, InvalidTask, tracing
from inferq.schemas.trace_context import trace_context
from inferq.storage.batches.store import errors_key, output_key
from inferq.storage.batches.times import Created
from inferq.storage.status.fields import CURSOR_PATTERN, read_cursor, write_cursor
from inferq.storage.status.index import StatusOutage

# A client generated from the OpenAPI document declares a body of bytes as the last of them.
_JSONL_TYPES = ("application/gzip", "application/jsonl", "application/x-ndjson")
_MAX_PAGE = 200

_log = logging.getLogger(__name__)

router = Router(prefix="/v1", tags=["batches"])


class BatchLinks(BaseModel):
    """Paths of the batch on the same gateway."""

    model_config = ConfigDict(frozen=True)

    self: str
    tasks: str
    output: str
    errors: str
    cancel: str


class BatchAnswer(BatchStatus):
    """A batch's status and links."""

    links: BatchLinks


class BatchPage(BaseModel):
    """A page of batches, newest first. `next` is the path of the next page, null on the last one."""

    model_config = ConfigDict(frozen=True)

    items: tuple[BatchStatus, ...]
    cursor: str | None
    next: str | None


_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Batch"}},
            **{name: {"schema": SENT_FILE} for name in _JSONL_TYPES},
        },
    }
}


@router.post(
    "/batches",
    status_code=202,
    response_model=BatchAnswer,
    summary="Submit a batch",
    openapi_extra=_BODIES,
)
async def post_batch(
    request: Request,
    tenant: CurrentTenant,
    services: ServicesDep,
    spec: Annotated[
        str | None,
        Query(max_length=MAX_BODY_BYTES, json_schema_extra={"contentMediaType": "application/json"}),
    ] = None,
) -> Response:
    """The body is one of two things.

    - The batch as JSON. Its `source` is an upload (`inferq:`) or an S3 URL.
    - The JSONL itself, as `application/x-ndjson`, or gzipped as `application/gzip`. The gateway streams it into
      the object store. The query's `spec` holds the rest of the batch as JSON.

    The same `batch_id` is the same batch: submitted twice, it runs once.
    """
    content_type, _ = parse_options_header(request.headers.get("content-type", ""))
    if content_type.decode("latin-1") in _JSONL_TYPES:
        document = await _stream_source(request, services, tenant, spec)
    else:
        try:
            document = await read_json(request, limit=MAX_BODY_BYTES, seconds=services.settings.body_timeout)
        except InvalidTask as error:
            raise InvalidTask(f"{error.message}; {SEND_JSONL_AS}", code=error.code) from error
    wanted = requested_batch(document, tenant=tenant)
    bind_contextvars(batch_id=wanted.batch_id)
    trace = tracing.current().context or trace_context(request.headers)
    batch = await submit_batch(services, wanted, trace)
    status = await find_batch(services, tenant, batch.batch_id)
    return _answer(services.paths, status or status_of(batch, None), code=202, location=True)


async def _stream_source(
    request: Request, services: Services, tenant: str, spec: str | None
) -> dict[str, Any]:
    """Store a JSONL body; the batch that has it as its source."""
    document = decode_json(spec.encode(), what="spec") if spec else {}
    if "source" in document:
        raise ProblemError(422, "two_sources", "the body is the source; leave `source` out of `spec`")
    # A bad spec is refused before the body is read.
    requested_batch(document | {"source": "inferq:placeholder"}, tenant=tenant, what="spec")
    settings = services.settings
    chunks = body_chunks(request, limit=settings.max_upload_bytes, seconds=settings.body_timeout)
    async with aclosing(chunks) as stream:
        try:
            stored = await store_upload(services, tenant, stream, "application/x-ndjson", "batch.jsonl")
        except EmptyUpload as error:
            raise ProblemError(
                422, "empty_batch", "the body is empty; send JSONL with one task per line"
            ) from error
    return document | {"source": stored.url, "source_sha256": stored.sha256}


@router.get("/batches", response_model=BatchPage, summary="List batches, newest first")
async def list_batches(
    tenant: CurrentTenant,
    services: ServicesDep,
    cursor: Annotated[str | None, Query(min_length=1, json_schema_extra={"pattern": CURSOR_PATTERN})] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 50,
) -> Response:
    """All batches of the tenant."""
    before = None
    if cursor:
        at, batch_id = read_cursor(cursor)
        before = Created(int(at), batch_id)
    found = await services.on_store(services.batches.newest, tenant, before=before, limit=limit + 1)
    more, found = len(found) > limit, found[:limit]
    statuses = [(entry, await find_batch(services, tenant, entry.batch_id)) for entry in found]
    # A batch that was submitted again after its deletion is listed once, with its present time.
    items = tuple(
        status
        for entry, status in statuses
        if status is not None and Created.of(status.batch_id, status.created_at) == entry
    )
    last = write_cursor(str(found[-1].at), found[-1].batch_id) if more else None
    next_path = page_path(services.paths.batches, {"cursor": last, "limit": limit})
    return page_response(BatchPage(items=items, cursor=last, next=next_path), next_path)


@router.get("/batches/{batch_id}", response_model=BatchAnswer, summary="Get a batch's status")
async def get_batch(batch_id: str, tenant: CurrentTenant, services: ServicesDep) -> Response:
    """Its state, the number of its tasks in each state, and how fast it proceeds."""
    return _answer(services.paths, await require_batch(services, tenant, batch_id))


@router.post(
    "/batches/{batch_id}/cancel",
    status_code=202,
    response_model=BatchAnswer,
    summary="Cancel a batch",
    responses={
        200: {"model": BatchAnswer, "description": "The batch was cancelled before"},
        409: {"description": "The batch has completed or failed (`already_ended`)"},
    },
)
async def cancel_batch(batch_id: str, tenant: CurrentTenant, services: ServicesDep) -> Response:
    """No further task is fed, queued tasks do not start, and running tasks stop.

    The batch then ends with its output and errors.
    """
    status = await require_batch(services, tenant, batch_id)
    if status.state == "cancelled":
        return _answer(services.paths, status)
    if status.ended:
        raise ProblemError(
            409, "already_ended", f"batch {batch_id!r} has already {status.state}; it cannot be cancelled",
            extensions={"batch_id": batch_id, "state": status.state},
        )  # fmt: skip
    await services.on_store(services.batches.request_cancel, tenant, batch_id)
    try:
        await services.on_redis(services.batch_index.request_cancel, tenant, batch_id)
    except StatusOutage as error:
        _log.warning("batch %s: cancelled without a flag in Redis, which is unavailable: %s", batch_id, error)
    # The batch may have no feeder: its message was never published, or it waits for its window to open.
    message = feed_message(tenant, batch_id, chain=secrets.token_hex(6))
    await services.publisher.confirm(message, timeout=services.settings.submit_timeout)
    return _answer(services.paths, status.model_copy(update={"cancel_requested": True}), code=202)


@router.get("/batches/{batch_id}/output", summary="Get a batch's results", **as_file("application/x-ndjson"))
async def get_output(
    batch_id: str, request: Request, tenant: CurrentTenant, services: ServicesDep
) -> Response:
    """The results of tasks that succeeded, as JSONL in line order. Answers 409 (`not_ended`) until the batch ends."""
    return await _file(request, services, tenant, batch_id, output_key, "output.jsonl")


@router.get("/batches/{batch_id}/errors", summary="Get a batch's errors", **as_file("application/x-ndjson"))
async def get_errors(
    batch_id: str, request: Request, tenant: CurrentTenant, services: ServicesDep
) -> Response:
    """Failed, cancelled and invalid tasks, as JSONL in line order. Answers 409 (`not_ended`) until the batch ends."""
    return await _file(request, services, tenant, batch_id, errors_key, "errors.jsonl")


async def _file(
    request: Request, services: Services, tenant: str, batch_id: str, key_of: Any, name: str
) -> Response:
    status = await require_batch(services, tenant, batch_id)
    if not status.ended:
        raise ProblemError(
            409, "not_ended", f"batch {batch_id!r} is {status.state}; its files are written when it ends",
            headers={"Retry-After": "5"}, extensions={"batch_id": batch_id, "state": status.state},
        )  # fmt: skip
    key = key_of(tenant, batch_id)
    info = await services.on_store(services.store.stat, key)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Content-Type": "application/x-ndjson",
    }
    return await download(request, services, key, size=info.bytes, etag=f'"{info.etag}"', headers=headers)


def _answer(paths: Paths, status: BatchStatus, *, code: int = 200, location: bool = False) -> Response:
    path = paths.batch(status.batch_id)
    links = BatchLinks(
        self=path,
        tasks=f"{paths.tasks}?{urlencode({'batch_id': status.batch_id})}",
        output=f"{path}/output",
        errors=f"{path}/errors",
        cancel=f"{path}/cancel",
    )
    answer = BatchAnswer.model_construct(**dict(status), links=links)
    return json_response(answer, code, {"Location": path} if location else None)
