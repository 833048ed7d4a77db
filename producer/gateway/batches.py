"""The routes of batches: submit, look, list, cancel, and the files that they end with."""

from __future__ import annotations

import asyncio
import heapq
import logging
import secrets
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header

from inferq.broker import feed_message
from inferq.broker.messages import Message
from inferq.producer.batch.start import start
from inferq.producer.gateway.auth import Tenant
from inferq.producer.gateway.batch_request import JSONL_GOES_AS, check_upload, complete
from inferq.producer.gateway.body import decode_object, pieces, read_object
from inferq.producer.gateway.files import chunks_of, store_upload
from inferq.producer.gateway.problems import Refused, not_found, refusal_of
from inferq.producer.gateway.services import Here, Services
from inferq.schemas import (
    MAX_BODY_BYTES,
    Batch,
    BatchCounts,
    BatchId,
    BatchState,
    BatchStatus,
    BatchSummary,
    CountsNow,
    InferqError,
    InvalidTask,
    Outage,
)
from inferq.storage.batches.index import Standing
from inferq.storage.batches.store import BatchConflict, errors_key, output_key
from inferq.storage.status.fields import micros, read_cursor, write_cursor
from inferq.storage.status.index import StatusOutage

JSONL_TYPES = ("application/x-ndjson", "application/jsonl", "application/gzip")
_ID: TypeAdapter[str] = TypeAdapter(BatchId)
_PAGE = 200

_log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["batches"])


class BatchLinks(BaseModel):
    """Where to go on from a batch: paths on the same gateway."""

    model_config = ConfigDict(frozen=True)

    self: str
    tasks: str
    output: str
    errors: str
    cancel: str


class BatchAnswer(BatchStatus):
    """Where a batch stands, and its links."""

    links: BatchLinks


class BatchPage(BaseModel):
    """Some batches, the newest first. `next` is the path of the page after, none on the last."""

    model_config = ConfigDict(frozen=True)

    items: tuple[BatchStatus, ...]
    cursor: str | None
    next: str | None


_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": Batch.model_json_schema()},
            "application/x-ndjson": {"schema": {"type": "string", "format": "binary"}},
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
    tenant: Tenant,
    services: Here,
    spec: Annotated[str | None, Query(max_length=MAX_BODY_BYTES)] = None,
) -> Response:
    """The body is the batch as JSON, whose `source` is an upload (`inferq:`) or in S3; or it is the JSONL
    itself (`application/x-ndjson`, perhaps gzipped as `application/gzip`), streamed, with the rest of the
    batch as JSON in the query's `spec`. The same `batch_id` is the same batch: twice submitted, it runs once.
    """
    content_type, _ = parse_options_header(request.headers.get("content-type", ""))
    settings = services.settings
    if content_type.decode("latin-1") in JSONL_TYPES:
        said = decode_object(spec.encode(), what="spec") if spec else {}
        if "source" in said:
            raise Refused(422, "two_sources", "the body is the source: leave `source` out of `spec`")
        # Before anything is taken in.
        complete(said | {"source": "inferq:to-come"}, tenant=tenant, what="spec")
        body = pieces(request, limit=settings.max_upload_bytes, seconds=settings.body_timeout)
        async with aclosing(body) as stream:
            stored = await store_upload(services, tenant, stream, "application/x-ndjson", "batch.jsonl")
        if stored.bytes == 0:
            raise Refused(422, "empty_batch", "the body is empty: send a JSONL with a task in each line")
        said |= {"source": stored.url, "source_sha256": stored.sha256}
    else:
        try:
            said = await read_object(request, limit=MAX_BODY_BYTES, seconds=settings.body_timeout)
        except InvalidTask as error:
            raise InvalidTask(f"{error.message}; {JSONL_GOES_AS}", code=error.code) from error
    batch = complete(said, tenant=tenant)
    await check_upload(services, batch)
    try:
        kept = await services.on_store(
            start, batch, services.batches, _publishing(services, asyncio.get_running_loop())
        )
    except BatchConflict as error:
        raise Refused(409, "id_conflict", error.message) from error
    except InferqError as error:
        refused = refusal_of(error)
        # With its id the client can submit the same batch again; it may even have been taken.
        refused.about["batch_id"] = batch.batch_id
        raise refused from error
    services.known_batches.keep(kept)
    status = await find_batch(services, tenant, kept.batch_id)
    return _answer(status or _status(kept, None), code=202, location=True)


def _publishing(services: Services, loop: asyncio.AbstractEventLoop) -> Any:
    def publish(message: Message) -> None:
        sending = services.publisher.confirm(message, timeout=services.settings.submit_timeout)
        asyncio.run_coroutine_threadsafe(sending, loop).result()

    return publish


@router.get("/batches", response_model=BatchPage, summary="List batches, the newest first")
async def list_batches(
    tenant: Tenant,
    services: Here,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=_PAGE)] = 50,
) -> Response:
    before = _place(*read_cursor(cursor)) if cursor else None

    def older() -> list[tuple[int, str]]:
        places = (_place(micros(made), batch_id) for made, batch_id in services.batches.made(tenant))
        return heapq.nlargest(limit + 1, (place for place in places if before is None or place < before))

    places = await services.on_store(older)
    more, places = len(places) > limit, places[:limit]
    found = [await find_batch(services, tenant, name) for _, name in places]
    last = write_cursor(str(places[-1][0]), places[-1][1]) if more else None
    following = f"/v1/batches?{urlencode({'cursor': last, 'limit': limit})}" if last else None
    items = tuple(status for status in found if status is not None)
    page = BatchPage(items=items, cursor=last, next=following)
    headers = {"Link": f'<{following}>; rel="next"'} if following else {}
    return Response(page.model_dump_json(), headers=headers, media_type="application/json")


def _place(made: str, batch_id: str) -> tuple[int, str]:
    """What a listing sorts by."""
    return int(made), batch_id


@router.get("/batches/{batch_id}", response_model=BatchAnswer, summary="Where a batch stands")
async def get_batch(batch_id: str, tenant: Tenant, services: Here) -> Response:
    return _answer(await require_batch(services, tenant, batch_id))


@router.post(
    "/batches/{batch_id}/cancel",
    status_code=202,
    response_model=BatchAnswer,
    summary="Cancel a batch",
    responses={
        200: {"model": BatchAnswer, "description": "It is cancelled already"},
        409: {"description": "It has ended otherwise (`already_ended`)"},
    },
)
async def cancel_batch(batch_id: str, tenant: Tenant, services: Here) -> Response:
    """Nothing more of it is fed, nothing that is queued starts, and what runs stops; its files come then."""
    status = await require_batch(services, tenant, batch_id)
    if status.state == "cancelled":
        return _answer(status)
    if status.ended:
        raise Refused(
            409, "already_ended", f"batch {batch_id!r} has {status.state}: there is nothing to cancel",
            about={"batch_id": batch_id, "state": status.state},
        )  # fmt: skip
    await services.on_store(services.batches.request_cancel, tenant, batch_id)
    try:
        await services.on_redis(services.batch_index.request_cancel, tenant, batch_id)
    except StatusOutage as error:
        _log.warning("batch %s: to be cancelled, though Redis does not know: %s", batch_id, error)
    # Nobody may be feeding it: its feeding was never handed over, or waits for a window to open.
    message = feed_message(tenant, batch_id, chain=secrets.token_hex(6))
    await services.publisher.confirm(message, timeout=services.settings.submit_timeout)
    return _answer(status.model_copy(update={"cancel_requested": True}), code=202)


@router.get("/batches/{batch_id}/output", summary="The results of what succeeded, in line order")
async def get_output(batch_id: str, tenant: Tenant, services: Here) -> Response:
    """JSONL. `409` (`not_ended`) until the batch has ended."""
    return await _file(services, tenant, batch_id, output_key, "output.jsonl")


@router.get("/batches/{batch_id}/errors", summary="What failed, was cancelled or was invalid")
async def get_errors(batch_id: str, tenant: Tenant, services: Here) -> Response:
    """JSONL, in line order. `409` (`not_ended`) until the batch has ended."""
    return await _file(services, tenant, batch_id, errors_key, "errors.jsonl")


async def _file(services: Services, tenant: str, batch_id: str, key_of: Any, name: str) -> Response:
    status = await require_batch(services, tenant, batch_id)
    if not status.ended:
        raise Refused(
            409, "not_ended", f"batch {batch_id!r} is {status.state}: it has no files yet",
            headers={"Retry-After": "5"}, about={"batch_id": batch_id, "state": status.state},
        )  # fmt: skip
    key = key_of(tenant, batch_id)
    info = await services.on_store(services.store.stat, key)
    stream: Iterator[bytes] = await services.on_store(services.store.stream, key)
    headers = {
        "Content-Length": str(info.bytes),
        "Content-Disposition": f'attachment; filename="{name}"',
        "ETag": f'"{info.etag}"',
    }
    return StreamingResponse(chunks_of(services, stream), headers=headers, media_type="application/x-ndjson")


def checked_batch_id(batch_id: str) -> str:
    """`batch_id` itself. Raises Refused (404) for one that no batch can have."""
    try:
        return _ID.validate_python(batch_id)
    except ValidationError as error:
        raise not_found(f"batch {batch_id!r}") from error


async def require_batch(services: Services, tenant: str, batch_id: str) -> BatchStatus:
    """Where the batch stands. Raises Refused (404) where there is none."""
    status = await find_batch(services, tenant, checked_batch_id(batch_id))
    if status is None:
        raise not_found(f"batch {batch_id!r}")
    return status


async def find_batch(services: Services, tenant: str, batch_id: str) -> BatchStatus | None:
    """Where the batch stands; None where there is none. Raises StoreOutage."""
    name = (tenant, batch_id)
    known = services.known_batches.get(*name)
    if known is None:
        (batch, summary), standing = await asyncio.gather(
            _recorded(services, *name), _standing(services, *name)
        )
    else:
        standing = await _standing(services, *name)
        if standing is not None and _is_fed(standing):
            return await _unended(services, known, standing)
        # Redis may have missed the end, and a batch without a feeder may have been deleted.
        batch, summary = await _recorded(services, *name)
    if batch is None or summary is not None:
        services.known_batches.drop(*name)
    else:
        services.known_batches.keep(batch)
    if batch is None:
        return None
    if summary is None:
        return await _unended(services, batch, standing)
    return _status(batch, None).model_copy(
        update={
            "state": summary.state,
            "counts": summary.counts,
            "error": summary.error,
            "rate": summary.tasks_per_second,
            "cancel_requested": summary.state == "cancelled",
            "finished_at": summary.finished_at,
        }
    )


async def _recorded(
    services: Services, tenant: str, batch_id: str
) -> tuple[Batch | None, BatchSummary | None]:
    return await asyncio.gather(
        services.on_store(services.batches.load, tenant, batch_id),
        services.on_store(services.batches.summary, tenant, batch_id),
    )


def _is_fed(standing: Standing) -> bool:
    """Whether Redis alone tells enough: a feeder has the batch, whose end begins once it is given back.

    A feeder whose message came twice may have it for a moment after the end, mostly still in its state.
    """
    return standing.leased and standing.state not in _ENDING


async def _standing(services: Services, tenant: str, batch_id: str) -> Standing | None:
    try:
        return await services.on_redis(services.batch_index.look, tenant, batch_id)
    except Outage as error:
        _log.warning("batch %s: its counts are not known: %s", batch_id, error)
        return None


async def _unended(services: Services, batch: Batch, standing: Standing | None) -> BatchStatus:
    """Where a batch stands of which Redis knows nothing, or no counts, as far as the object store says."""
    name = (batch.tenant, batch.batch_id)
    nothing_is_fed = standing is not None and (standing.known or standing.state == "preparing")
    source = None if nothing_is_fed else await services.on_store(services.batches.source, *name)
    if source is None:
        return _status(batch, standing)
    state: BatchState = "feeding"
    if batch.window is not None and not batch.window.is_open(datetime.now(UTC)):
        state = "paused"
    return _status(batch, standing).model_copy(
        update={
            "state": (standing.state if standing is not None else None) or state,
            # Its feeder counts anew: until then nought would be a lie.
            "counts": CountsNow(total=source.total),
            "rate": None,
            "seconds_left": None,
            "cancel_requested": await services.on_store(services.batches.cancel_requested, *name),
        }
    )


_ENDING = (None, "finishing", "completed", "cancelled", "failed")


def _status(batch: Batch, standing: Standing | None) -> BatchStatus:
    counts = standing.counts if standing is not None else BatchCounts()
    rate = standing.rate if standing is not None else None
    left = None
    if counts.total is not None and rate:
        left = round((counts.total - counts.ended - counts.invalid) / rate, 1)
    state = (standing.state if standing is not None else None) or "preparing"
    return BatchStatus(
        batch_id=batch.batch_id,
        tenant=batch.tenant,
        # What its files and summary stand for comes from the object store alone.
        state="finishing" if state in _ENDING else state,
        source=batch.source,
        task_type=batch.task_type,
        priority=batch.priority,
        counts=counts,
        rate=round(rate, 2) if rate is not None else None,
        seconds_left=left,
        cancel_requested=standing.cancel_requested if standing is not None else False,
        error=standing.error if standing is not None else None,
        schedule=batch.schedule,
        metadata=batch.metadata,
        created_at=batch.created_at,
    )


def batch_path(batch_id: str) -> str:
    """The path of a batch's own resource. `.` and `..` are ids too, and must not be taken for folders."""
    return f"/v1/batches/{'%2E' * len(batch_id) if batch_id in ('.', '..') else batch_id}"


def _answer(status: BatchStatus, *, code: int = 200, location: bool = False) -> Response:
    path = batch_path(status.batch_id)
    links = BatchLinks(
        self=path,
        tasks=f"/v1/tasks?{urlencode({'batch_id': status.batch_id})}",
        output=f"{path}/output",
        errors=f"{path}/errors",
        cancel=f"{path}/cancel",
    )
    answer = BatchAnswer.model_construct(**dict(status), links=links)
    headers = {"Location": path} if location else None
    return Response(answer.model_dump_json(), code, headers, "application/json")
