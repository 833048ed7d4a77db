"""The routes of operations: the figures of the whole installation, and its workers.

Every tenant may see the counts. Ids of tasks and names of nights are those of the caller's tenant.
"""

from __future__ import annotations

import logging

from fastapi.responses import Response

from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.responses import json_response
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import ServicesDep
from inferq.schemas.monitor import Stats, WorkerList
from inferq.storage.status.index import StatusOutage

_REDIS = "Redis is unavailable"
_NO_MONITOR = "no monitor has reported lately; run: inferq monitor"

_log = logging.getLogger(__name__)

router = Router(prefix="/v1", tags=["operations"])


@router.get("/stats", response_model=Stats, summary="Get the figures of queues, batches and nights")
async def get_stats(tenant: CurrentTenant, services: ServicesDep) -> Response:
    """The figures that `inferq monitor` last read. What is unknown is null, and `unknown` says why."""
    try:
        stats = await services.on_redis(services.figures.load)
    except StatusOutage as error:
        _log.warning("the figures are unknown: %s", error)
        return json_response(_unknown(_REDIS))
    if stats is None:
        return json_response(_unknown(_NO_MONITOR))
    if stats.late_nights is not None:
        own = tuple(night for night in stats.late_nights if night.tenant == tenant)
        stats = stats.model_copy(update={"late_nights": own})
    return json_response(stats)


@router.get("/workers", response_model=WorkerList, summary="List the workers")
async def list_workers(tenant: CurrentTenant, services: ServicesDep) -> Response:
    """The workers whose heartbeats are fresh, at most 1,000.

    `tasks` holds those of the caller's tenant; `in_hand` counts all.
    """
    try:
        found = await services.on_redis(services.workers.read)
    except StatusOutage as error:
        _log.warning("the workers are unknown: %s", error)
        return json_response(WorkerList(unknown=_REDIS))
    items = (
        worker.model_copy(update={"tasks": tuple(task for task in worker.tasks if task.tenant == tenant)})
        for worker in sorted(
            found.workers, key=lambda worker: (worker.task_type, worker.name, worker.worker_id)
        )
    )
    return json_response(WorkerList(items=tuple(items)))


def _unknown(reason: str) -> Stats:
    return Stats(unknown={name: reason for name in Stats.model_fields if name not in ("at", "unknown")})
