"""The routes of callbacks: their status, and sending them again."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict

from inferq.broker import callback_message
from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.batch_lookup import checked_batch_id, require_batch
from inferq.producer.gateway.problems import ProblemError, not_found
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.producer.gateway.task_lookup import checked_task_id, find_result, require_status
from inferq.schemas import (
    EVENT_OF_STATE,
    Callback,
    CallbackRecord,
    InferqError,
    Outage,
    SubjectKind,
    batch_callback,
    end_callback,
)
from inferq.storage.status.index import StatusOutage

_CALLBACK_ID = re.compile(r"msg_[0-9a-f]{32}")

_log = logging.getLogger(__name__)

router = Router(prefix="/v1", tags=["callbacks"])


class CallbackList(BaseModel):
    """Callbacks and their attempts."""

    model_config = ConfigDict(frozen=True)

    items: tuple[CallbackRecord, ...]


@router.get("/tasks/{task_id}/callbacks", summary="List a task's callbacks")
async def task_callbacks(task_id: str, tenant: CurrentTenant, services: ServicesDep) -> CallbackList:
    """Each callback with its attempts. Failed callbacks are kept in the object store, all others in Redis."""
    return await _listed(services, tenant, "task", checked_task_id(task_id))


@router.get("/batches/{batch_id}/callbacks", summary="List a batch's callbacks")
async def batch_callbacks(batch_id: str, tenant: CurrentTenant, services: ServicesDep) -> CallbackList:
    """Each callback with its attempts. A nightly run's callbacks are those of its batch."""
    return await _listed(services, tenant, "batch", checked_batch_id(batch_id))


@router.post(
    "/tasks/{task_id}/callbacks/resend", status_code=202, summary="Send a task's failed callbacks again"
)
async def resend_failed(task_id: str, tenant: CurrentTenant, services: ServicesDep) -> CallbackList:
    """Every failed callback is sent again. Its `webhook-id` stays the same."""
    return await _resent(services, tenant, "task", checked_task_id(task_id))


@router.post(
    "/batches/{batch_id}/callbacks/resend", status_code=202, summary="Send a batch's failed callbacks again"
)
async def resend_failed_of_batch(batch_id: str, tenant: CurrentTenant, services: ServicesDep) -> CallbackList:
    """Every failed callback is sent again. Its `webhook-id` stays the same."""
    return await _resent(services, tenant, "batch", checked_batch_id(batch_id))


@router.post(
    "/tasks/{task_id}/callbacks/{callback_id}/resend", status_code=202, summary="Send a callback again"
)
async def resend_one(
    task_id: str, callback_id: str, tenant: CurrentTenant, services: ServicesDep
) -> CallbackList:
    """In any state. Its `webhook-id` stays the same, so that a receiver can tell it is a duplicate."""
    return await _resent(services, tenant, "task", checked_task_id(task_id), callback_id)


@router.post(
    "/batches/{batch_id}/callbacks/{callback_id}/resend",
    status_code=202,
    summary="Send a batch's callback again",
)
async def resend_one_of_batch(
    batch_id: str, callback_id: str, tenant: CurrentTenant, services: ServicesDep
) -> CallbackList:
    """In any state. Its `webhook-id` stays the same, so that a receiver can tell it is a duplicate."""
    return await _resent(services, tenant, "batch", checked_batch_id(batch_id), callback_id)


@router.get("/callbacks", summary="List failed callbacks, newest first")
async def failed_callbacks(
    tenant: CurrentTenant,
    services: ServicesDep,
    status: Annotated[Literal["failed"], Query()] = "failed",  # noqa: ARG001 - the only value
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> CallbackList:
    """Failed callbacks of tasks and batches that the status index still holds."""
    return CallbackList(items=await services.on_redis(services.callbacks.failures, tenant, limit=limit))


async def _listed(services: Services, tenant: str, kind: SubjectKind, subject_id: str) -> CallbackList:
    found = await _load(services, tenant, kind, subject_id)
    if not found:
        await _require(services, tenant, kind, subject_id)
    return CallbackList(items=tuple(record.model_copy(update={"body": None}) for record in found))


async def _resent(
    services: Services, tenant: str, kind: SubjectKind, subject_id: str, callback_id: str | None = None
) -> CallbackList:
    """Send one callback again, or all failed ones. Raises ProblemError."""
    if callback_id is None:
        known = await _load(services, tenant, kind, subject_id)
        chosen = [record for record in known if record.state == "failed"]
        if not chosen:
            await _require(services, tenant, kind, subject_id)
    else:
        valid = _CALLBACK_ID.fullmatch(callback_id) is not None
        chosen = list(await _load(services, tenant, kind, subject_id, callback_id)) if valid else []
        if not chosen:
            raise not_found(f"callback {callback_id[:80]!r} of {kind} {subject_id!r}")
    return CallbackList(items=tuple([await _resend(services, record) for record in chosen]))


async def _require(services: Services, tenant: str, kind: SubjectKind, subject_id: str) -> None:
    """Raise ProblemError (404) if there is no such task or batch."""
    if kind == "task":
        await require_status(services, tenant, subject_id)
    else:
        await require_batch(services, tenant, subject_id)


async def _load(
    services: Services, tenant: str, kind: SubjectKind, subject_id: str, only: str | None = None
) -> tuple[CallbackRecord, ...]:
    """The callbacks of a task or batch, oldest first; with `only`, the callback with that id.

    Raises Outage if both Redis and the object store are unavailable.
    """
    outage: Outage | None = None
    known: dict[str, CallbackRecord] = {}
    try:
        kept = await services.on_store(services.callbacks.kept, tenant, kind, subject_id, only)
        known = {record.callback_id: record for record in kept}
    except Outage as error:
        outage = error
    try:
        indexed = await services.on_redis(services.callbacks.indexed, tenant, kind, subject_id, only)
        for record in indexed:
            failed = known.get(record.callback_id)
            if failed is None:
                known[record.callback_id] = record
            elif record.updated_at >= failed.updated_at:  # else the index missed the failure
                known[record.callback_id] = record.model_copy(update={"body": failed.body})
    except StatusOutage as error:
        if outage is not None:
            raise outage from error
    return tuple(sorted(known.values(), key=lambda record: record.updated_at))


async def _resend(services: Services, record: CallbackRecord) -> CallbackRecord:
    callback = await _rebuilt(services, record)
    # After the record's last change, also if that was made by a clock that was ahead: the latest record counts.
    now = max(datetime.now(UTC), record.updated_at + timedelta(microseconds=1))
    again = record.model_copy(
        update={
            "state": "waiting",
            "reason": "sent again",
            "next_at": now,
            "attempts": (),
            "resent_at": now,
            "updated_at": now,
            "body": None,
        }
    )
    # Before publishing, or it could overwrite the record of the delivery.
    await _note(services, again)
    try:
        await services.publisher.confirm(
            callback_message(callback, resent_at=now), timeout=services.settings.submit_timeout
        )
    except InferqError:
        await _note(services, record.model_copy(update={"resent_at": now}))
        raise
    return again


async def _note(services: Services, record: CallbackRecord) -> None:
    try:
        # Else a second "resend all failed" would start another chain of attempts.
        await services.on_redis(services.callbacks.note, record)
    except StatusOutage as error:
        _log.warning(
            "callback %s: sent again without a record, as Redis is unavailable: %s", record.callback_id, error
        )


async def _rebuilt(services: Services, record: CallbackRecord) -> Callback:
    """The record's callback: the kept one, or one rebuilt from the task's result or the batch's summary.

    Raises ProblemError (409) if it is neither.
    """
    if record.body is not None:
        return Callback.model_validate(record.model_dump(include=set(Callback.model_fields)))
    rebuilt: Callback | None = None
    if record.subject_kind == "task":
        result = await find_result(services, record.tenant, record.subject_id)
        if result is not None and record.event == EVENT_OF_STATE[result.status]:
            rebuilt = end_callback(result, record.url)
    else:
        summary = await services.on_store(services.batches.summary, record.tenant, record.subject_id)
        if summary is not None:
            rebuilt = batch_callback(summary, record.url)
    if rebuilt is not None and rebuilt.callback_id == record.callback_id:
        return rebuilt
    raise ProblemError(
        409,
        "callback_not_kept",
        f"callback {record.callback_id} ({record.event}) is no longer kept; only callbacks of an end, and "
        "failed ones, can be sent again",
    )
