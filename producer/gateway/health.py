"""Whether the gateway lives, whether it can work, and what it counts; open without a key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Literal

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from inferq.producer.gateway.services import Here, Services
from inferq.schemas import Outage

_KEPT_SECONDS = 1.0
_CHECK_SECONDS = 5.0

_log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])


class Check(BaseModel):
    """One thing that the gateway depends on. `detail` says what is wrong."""

    model_config = ConfigDict(frozen=True)

    ok: bool
    detail: str | None = None


class Readiness(BaseModel):
    """`degraded`: tasks are accepted and results given, but something is slower or missing."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ready", "degraded", "unavailable"]
    checks: dict[str, Check]


class ReadinessProbe:
    """Looks at what the gateway depends on, at most once a second however often it is asked."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = asyncio.Lock()
        self._known: tuple[float, Readiness] | None = None

    async def readiness(self) -> Readiness:
        async with self._lock:
            now = time.monotonic()
            if self._known is None or now - self._known[0] > _KEPT_SECONDS:
                self._known = now, await self._look()
            return self._known[1]

    async def _look(self) -> Readiness:
        services = self._services
        store, redis = await asyncio.gather(
            _checked(services.on_store(services.store.ping)),
            _checked(services.on_redis(services.status.ping)),
        )
        publisher = services.publisher
        blocked = publisher.blocked_reason
        broker = Check(ok=publisher.connected, detail=None if publisher.connected else "not connected")
        if publisher.connected and blocked is not None:
            broker = Check(ok=True, detail=f"blocks publishing: {blocked}")
        checks = {"broker": broker, "store": store, "redis": redis}
        if services.closing.is_set() or not (broker.ok and store.ok):
            return Readiness(status="unavailable", checks=checks)
        degraded = blocked is not None or not redis.ok
        return Readiness(status="degraded" if degraded else "ready", checks=checks)


async def _checked(looking: Awaitable[None]) -> Check:
    try:
        with anyio.fail_after(_CHECK_SECONDS):
            await looking
    except Outage as error:
        _log.warning("not ready: %s", error)  # the page is open to everybody, and the message names our hosts
        return Check(ok=False, detail=f"cannot be used ({error.code}); the log says why")
    except TimeoutError:
        return Check(ok=False, detail=f"no answer within {_CHECK_SECONDS:g} s")
    return Check(ok=True)


@router.get("/healthz", summary="Whether the process lives")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/readyz",
    response_model=Readiness,
    summary="Whether tasks can be taken",
    responses={503: {"model": Readiness, "description": "They cannot"}},
)
async def readyz(request: Request) -> Response:
    """Redis may be away: tasks are accepted and results given without it (`degraded`)."""
    probe: ReadinessProbe = request.app.state.readiness
    readiness = await probe.readiness()
    code = 503 if readiness.status == "unavailable" else 200
    return Response(readiness.model_dump_json(), code, media_type="application/json")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(services: Here) -> Response:
    return Response(services.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
