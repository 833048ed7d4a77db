"""The routes of callbacks: what became of them, and sending one again."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from broker import callback_message
from producer.gateway.auth import Tenant
from producer.gateway.lookup import checked_id, find_result, require_status
from producer.gateway.problems import Refused, not_found
from producer.gateway.services import Here, Services
from schemas import EVENT_OF_STATE, Callback, CallbackRecord, Outage, end_callback
from storage.status import StatusOutage

_log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["callbacks"])


class CallbackList(BaseModel):
    """Callbacks and their attempts."""

    model_config = ConfigDict(frozen=True)

    items: tuple[CallbackRecord, ...]


@router.get("/tasks/{task_id}/callbacks", summary="What became of a task's callbacks")
async def task_callbacks(task_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """Each callback with its attempts: as the index has it, and what was given up from the object store."""
    checked_id(task_id)
    found = await _known(services, tenant, task_id)
    if not found:
        await require_status(services, tenant, task_id)
    return CallbackList(items=tuple(record.model_copy(update={"body": None}) for record in found))


@router.post(
    "/tasks/{task_id}/callbacks/resend", status_code=202, summary="Send a task's failed callbacks again"
)
async def resend_failed(task_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """All that were given up, each under the `webhook-id` that it had."""
    checked_id(task_id)
    failed = [record for record in await _known(services, tenant, task_id) if record.state == "failed"]
    if not failed:
        await require_status(services, tenant, task_id)
    return CallbackList(items=tuple([await _resend(services, record) for record in failed]))


@router.post(
    "/tasks/{task_id}/callbacks/{callback_id}/resend", status_code=202, summary="Send a callback again"
)
async def resend_one(task_id: str, callback_id: str, tenant: Tenant, services: Here) -> CallbackList:
    """Whatever became of it before; the `webhook-id` stays, so that a receiver knows what it has already."""
    checked_id(task_id)
    for record in await _known(services, tenant, task_id):
        if record.callback_id == callback_id:
            return CallbackList(items=(await _resend(services, record),))
    raise not_found(f"callback {callback_id[:80]!r} of task {task_id!r}")


@router.get("/callbacks", summary="Callbacks that were given up, the newest first")
async def failed_callbacks(
    tenant: Tenant,
    services: Here,
    status: Annotated[Literal["failed"], Query()] = "failed",  # noqa: ARG001 - the only one that is listed
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> CallbackList:
    """Of tasks and batches, as far as the index keeps them."""
    return CallbackList(items=await services.on_redis(services.callbacks.failures, tenant, limit=limit))


async def _known(services: Services, tenant: str, task_id: str) -> tuple[CallbackRecord, ...]:
    """The task's callbacks, the oldest first. Raises an Outage where neither place can be asked."""
    outage: Outage | None = None
    known: dict[str, CallbackRecord] = {}
    try:
        kept = await services.on_store(services.callbacks.kept, tenant, "task", task_id)
        known = {record.callback_id: record for record in kept}
    except Outage as error:
        outage = error
    try:
        for record in await services.on_redis(services.callbacks.indexed, tenant, "task", task_id):
            body = known[record.callback_id].body if record.callback_id in known else None
            known[record.callback_id] = record.model_copy(update={"body": body})
    except StatusOutage as error:
        if outage is not None:
            raise outage from error
    return tuple(sorted(known.values(), key=lambda record: record.updated_at))


async def _resend(services: Services, record: CallbackRecord) -> CallbackRecord:
    callback = await _made_again(services, record)
    await services.publisher.confirm(
        callback_message(callback, resent=True), timeout=services.settings.submit_timeout
    )
    now = datetime.now(UTC)
    again = record.model_copy(
        update={
            "state": "waiting",
            "reason": "sent again",
            "next_at": now,
            "attempts": (),
            "updated_at": now,
            "body": None,
        }
    )
    try:
        # Or whoever asks for all that failed again would start another chain of attempts.
        await services.on_redis(services.callbacks.note, again)
    except StatusOutage as error:
        _log.warning("callback %s is sent again, but not on record: %s", record.callback_id, error)
    return again


async def _made_again(services: Services, record: CallbackRecord) -> Callback:
    """The callback that a record is of: as it was kept, or made anew of the task's record. Raises Refused."""
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
    result = await find_result(services, record.tenant, record.subject_id)
    if result is not None and record.event == EVENT_OF_STATE[result.status]:
        made = end_callback(result, record.url)
        if made.callback_id == record.callback_id:
            return made
    raise Refused(
        409,
        "callback_not_kept",
        f"callback {record.callback_id} ({record.event}) is kept no longer: ends, and what was given up, "
        "can be sent again",
    )
