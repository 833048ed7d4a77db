"""A batch's status: the end from the object store, the progress from Redis."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

from pydantic import TypeAdapter, ValidationError

from inferq.producer.gateway.problems import not_found
from inferq.producer.gateway.services import Services
from inferq.schemas import (
    Batch,
    BatchCounts,
    BatchId,
    BatchState,
    BatchStatus,
    BatchSummary,
    CountsNow,
    Outage,
)
from inferq.storage.batches.index import Standing

_ID: TypeAdapter[str] = TypeAdapter(BatchId)
_ENDING = (None, "finishing", "completed", "cancelled", "failed")

_log = logging.getLogger(__name__)


def checked_batch_id(batch_id: str) -> str:
    """`batch_id` itself. Raises ProblemError (404) if it is not a valid id, so that no batch can have it."""
    try:
        return _ID.validate_python(batch_id)
    except ValidationError as error:
        raise not_found(f"batch {batch_id!r}") from error


async def require_batch(services: Services, tenant: str, batch_id: str) -> BatchStatus:
    """The batch's status. Raises ProblemError (404) if there is no such batch."""
    status = await find_batch(services, tenant, checked_batch_id(batch_id))
    if status is None:
        raise not_found(f"batch {batch_id!r}")
    return status


async def find_batch(services: Services, tenant: str, batch_id: str) -> BatchStatus | None:
    """The batch's status; None if there is no such batch. Raises StoreOutage."""
    name = (tenant, batch_id)
    cached = services.batch_cache.get(*name)
    if cached is None:
        (batch, summary), standing = await asyncio.gather(
            _load(services, *name), _load_standing(services, *name)
        )
    else:
        standing = await _load_standing(services, *name)
        if standing is not None and _is_being_fed(standing):
            return await _unfinished(services, cached, standing)
        # Redis may have missed the end, and a batch without a feeder may have been deleted.
        batch, summary = await _load(services, *name)
    if batch is None or summary is not None:
        services.batch_cache.drop(*name)
    else:
        services.batch_cache.keep(batch)
    if batch is None:
        return None
    if summary is None:
        return await _unfinished(services, batch, standing)
    return status_of(batch, None).model_copy(
        update={
            "state": summary.state,
            "counts": summary.counts,
            "error": summary.error,
            "rate": summary.tasks_per_second,
            "cancel_requested": summary.state == "cancelled",
            "finished_at": summary.finished_at,
        }
    )


async def _load(services: Services, tenant: str, batch_id: str) -> tuple[Batch | None, BatchSummary | None]:
    return await asyncio.gather(
        services.on_store(services.batches.load, tenant, batch_id),
        services.on_store(services.batches.summary, tenant, batch_id),
    )


def _is_being_fed(standing: Standing) -> bool:
    """Whether a feeder has leased the batch, which then has not ended: Redis alone is enough.

    A feeder whose message was delivered twice may lease it for a moment after the end: the state shows that.
    """
    return standing.leased and standing.state not in _ENDING


async def _load_standing(services: Services, tenant: str, batch_id: str) -> Standing | None:
    try:
        return await services.on_redis(services.batch_index.look, tenant, batch_id)
    except Outage as error:
        _log.debug("batch %s: its counts are unavailable: %s", batch_id, error)
        return None


async def _unfinished(services: Services, batch: Batch, standing: Standing | None) -> BatchStatus:
    """The status of a batch without a summary; what Redis does not know comes from the object store."""
    name = (batch.tenant, batch.batch_id)
    redis_is_enough = standing is not None and (standing.known or standing.state == "preparing")
    source = None if redis_is_enough else await services.on_store(services.batches.source, *name)
    if source is None:
        return status_of(batch, standing)
    state: BatchState = "feeding"
    if batch.window is not None and not batch.window.is_open(datetime.now(UTC)):
        state = "paused"
    return status_of(batch, standing).model_copy(
        update={
            "state": (standing.state if standing is not None else None) or state,
            # Redis has lost the counts, and the feeder counts again: until then they are unknown.
            "counts": CountsNow(total=source.total),
            "rate": None,
            "seconds_left": None,
            "cancel_requested": await services.on_store(services.batches.cancel_requested, *name),
        }
    )


def status_of(batch: Batch, standing: Standing | None) -> BatchStatus:
    counts = standing.counts if standing is not None else BatchCounts()
    rate = standing.rate if standing is not None else None
    left = None
    if counts.total is not None and rate:
        left = round((counts.total - counts.ended - counts.invalid) / rate, 1)
    state = (standing.state if standing is not None else None) or "preparing"
    return BatchStatus(
        batch_id=batch.batch_id,
        tenant=batch.tenant,
        # A batch has ended once its summary is in the object store, whatever Redis says.
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
