"""The routes of operations: the figures of the whole installation, and its workers.

Every tenant may see the counts. Ids of tasks and names of nights are those of the caller's tenant.
"""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import Query
from fastapi.responses import Response

from inferq.producer.demand import DEFAULT_TARGET_WAIT, MAX_TARGET_WAIT, demand_of
from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.responses import json_response
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.schemas.monitor import Demand, Stats, WorkerList
from inferq.storage.status.index import StatusOutage

_REDIS = "Redis is unavailable"
_NO_MONITOR = "no monitor has reported lately; run: inferq monitor"

_log = logging.getLogger(__name__)

router = Router(prefix="/v1", tags=["operations"])


@router.get("/stats", response_model=Stats, summary="Get the figures of queues, batches and nights")
async def get_stats(tenant: CurrentTenant, services: ServicesDep) -> Response:
    """The figures that `inferq monitor` last read. What is unknown is null, and `unknown` says why."""
    stats = await _stats(services)
    if stats.late_nights is not None:
        own = tuple(night for night in stats.late_nights if night.tenant == tenant)
        stats = stats.model_copy(update={"late_nights": own})
    return json_response(stats)


@router.get("/demand", response_model=Demand, summary="Get the workers that each task type needs now")
async def get_demand(
    _tenant: CurrentTenant,
    services: ServicesDep,
    target_wait: Annotated[
        float,
        Query(ge=0, le=MAX_TARGET_WAIT, description="Seconds within which every waiting task should start."),
    ] = DEFAULT_TARGET_WAIT,
) -> Response:
    """For autoscalers: `types.TYPE.workers` is null while it is unknown, never 0, and `unknown` says why."""
    return json_response(demand_of(await _stats(services), target_wait))


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


async def _stats(services: Services) -> Stats:
    """The monitor's figures; without any, the reason."""
    try:
        stats = await services.on_redis(services.figures.load)
    except StatusOutage as error:
        _log.warning("the figures are unknown: %s", error)
        return _unknown(_REDIS)
    return _unknown(_NO_MONITOR) if stats is None else stats


def _unknown(reason: str) -> Stats:
    return Stats(unknown={name: reason for name in Stats.model_fields if name not in ("at", "unknown")})
