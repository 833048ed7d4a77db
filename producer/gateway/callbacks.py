"""The routes of callbacks: what became of them, and sending one again."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from inferq.broker import callback_message
from inferq.producer.gateway.auth import Tenant
from inferq.producer.gateway.batches import checked_batch_id, require_batch
from inferq.producer.gateway.lookup import checked_id, find_result, require_status
from inferq.producer.gateway.problems import Refused, not_found
from inferq.producer.gateway.services import Here, Services
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

_log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["callbacks"])


class CallbackList(BaseModel):
    """Callbacks and their attempts."""

    model_config = ConfigDict(frozen=True)

    items: tuple[CallbackRecord, ...]


@router.get("/tasks/{task_id}/callbacks", summary="What became of a task's callbacks")
async def task_callbacks(task_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """Each callback with its attempts: as the index has it, and what was given up from the object store."""
    return await _listed(services, tenant, "task", checked_id(task_id))


@router.get("/batches/{batch_id}/callbacks", summary="What became of a batch's callbacks")
async def batch_callbacks(batch_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """As for a task; those of a nightly run's nights are its batch's."""
    return await _listed(services, tenant, "batch", checked_batch_id(batch_id))


@router.post(
    "/tasks/{task_id}/callbacks/resend", status_code=202, summary="Send a task's failed callbacks again"
)
async def resend_failed(task_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """All that were given up, each under the `webhook-id` that it had."""
    return await _resent(services, tenant, "task", checked_id(task_id))


@router.post(
    "/batches/{batch_id}/callbacks/resend", status_code=202, summary="Send a batch's failed callbacks again"
)
async def resend_failed_of_batch(batch_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """All that were given up, each under the `webhook-id` that it had."""
    return await _resent(services, tenant, "batch", checked_batch_id(batch_id))


@router.post(
    "/tasks/{task_id}/callbacks/{callback_id}/resend", status_code=202, summary="Send a callback again"
)
async def resend_one(task_id: str, callback_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """Whatever became of it before; the `webhook-id` stays, so that a receiver knows what it has already."""
    return await _resent(services, tenant, "task", checked_id(task_id), callback_id)


@router.post(
    "/batches/{batch_id}/callbacks/{callback_id}/resend",
    status_code=202,
    summary="Send a batch's callback again",
)
async def resend_one_of_batch(
    batch_id: str, callback_id: str, tenant: Tenant, services: Here
) -> CallbackList:
    """Whatever became of it before; the `webhook-id` stays, so that a receiver knows what it has already."""
    return await _resent(services, tenant, "batch", checked_batch_id(batch_id), callback_id)


@router.get("/callbacks", summary="Callbacks that were given up, the newest first")
async def failed_callbacks(
    tenant: Tenant,
    services: Here,
    status: Annotated[Literal["failed"], Query()] = "failed",  # noqa: ARG001 - the only one that is listed
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> CallbackList:
    """Of tasks and batches, as far as the index keeps them."""
    return CallbackList(items=await services.on_redis(services.callbacks.failures, tenant, limit=limit))


async def _listed(services: Services, tenant: str, kind: SubjectKind, subject_id: str) -> CallbackList:
    found = await _known(services, tenant, kind, subject_id)
    if not found:
        await _require(services, tenant, kind, subject_id)
    return CallbackList(items=tuple(record.model_copy(update={"body": None}) for record in found))


async def _resent(
    services: Services, tenant: str, kind: SubjectKind, subject_id: str, callback_id: str | None = None
) -> CallbackList:
    """Send one callback again, or all that were given up. Raises Refused."""
    known = await _known(services, tenant, kind, subject_id)
    if callback_id is None:
        chosen = [record for record in known if record.state == "failed"]
        if not chosen:
            await _require(services, tenant, kind, subject_id)
    else:
        chosen = [record for record in known if record.callback_id == callback_id]
        if not chosen:
            raise not_found(f"callback {callback_id[:80]!r} of {kind} {subject_id!r}")
    return CallbackList(items=tuple([await _resend(services, record) for record in chosen]))


async def _require(services: Services, tenant: str, kind: SubjectKind, subject_id: str) -> None:
    """Raises Refused (404) where there is no such task or batch."""
    if kind == "task":
        await require_status(services, tenant, subject_id)
    else:
        await require_batch(services, tenant, subject_id)


async def _known(
    services: Services, tenant: str, kind: SubjectKind, subject_id: str
) -> tuple[CallbackRecord, ...]:
    """The callbacks of a task or batch, the oldest first.

    Raises an Outage where neither place can be asked.
    """
    outage: Outage | None = None
    known: dict[str, CallbackRecord] = {}
    try:
        kept = await services.on_store(services.callbacks.kept, tenant, kind, subject_id)
        known = {record.callback_id: record for record in kept}
    except Outage as error:
        outage = error
    try:
        for record in await services.on_redis(services.callbacks.indexed, tenant, kind, subject_id):
            given_up = known.get(record.callback_id)
            if given_up is None:
                known[record.callback_id] = record
            elif record.updated_at >= given_up.updated_at:  # the index may have missed that
                known[record.callback_id] = record.model_copy(update={"body": given_up.body})
    except StatusOutage as error:
        if outage is not None:
            raise outage from error
    return tuple(sorted(known.values(), key=lambda record: record.updated_at))


async def _resend(services: Services, record: CallbackRecord) -> CallbackRecord:
    callback = await _made_again(services, record)
    now = datetime.now(UTC)
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
    # Before, or this would stand over what becomes of it.
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
        # Or whoever asks for all that failed again would start another chain of attempts.
        await services.on_redis(services.callbacks.note, record)
    except StatusOutage as error:
        _log.warning("callback %s is to be sent again, but not on record: %s", record.callback_id, error)


async def _made_again(services: Services, record: CallbackRecord) -> Callback:
    """The callback that a record is of: as it was kept, or made anew of the end's record. Raises Refused."""
    about = {
        "callback_id": record.callback_id,
        "tenant": record.tenant,
        "subject_kind": record.subject_kind,
        "subject_id": record.subject_id,
        "event": record.event,
        "url": record.url,
    }
    if record.body is not None:
        return Callback.model_validate({**about, "body": record.body})
    made: Callback | None = None
    if record.subject_kind == "task":
        result = await find_result(services, record.tenant, record.subject_id)
        if result is not None and record.event == EVENT_OF_STATE[result.status]:
            made = end_callback(result, record.url)
    else:
        summary = await services.on_store(services.batches.summary, record.tenant, record.subject_id)
        if summary is not None:
            made = batch_callback(summary, record.url)
    if made is not None and made.callback_id == record.callback_id:
        return made
    raise Refused(
        409,
        "callback_not_kept",
        f"callback {record.callback_id} ({record.event}) is kept no longer: ends, and what was given up, "
        "can be sent again",
    )
