"""Liveness, readiness and metrics; open without an API key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Literal

from fastapi import Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.schemas import Outage

_CACHE_SECONDS = 1.0

_log = logging.getLogger(__name__)

router = Router(tags=["health"])


class Check(BaseModel):
    """The state of a service that the gateway depends on. `detail` says what is wrong."""

    model_config = ConfigDict(frozen=True)

    ok: bool
    detail: str | None = None


class Readiness(BaseModel):
    """`degraded`: the gateway accepts tasks and answers results, but a part is slow or missing."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ready", "degraded", "unavailable"]
    checks: dict[str, Check]


class ReadinessProbe:
    """Checks the services that the gateway depends on, at most once a second."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = asyncio.Lock()
        self._known: tuple[float, Readiness] | None = None
        self._warned: dict[str, str] = {}

    async def readiness(self) -> Readiness:
        async with self._lock:
            now = time.monotonic()
            if self._known is None or now - self._known[0] > _CACHE_SECONDS:
                self._known = now, await self._check()
            return self._known[1]

    async def _check(self) -> Readiness:
        services = self._services
        store, redis = await asyncio.gather(
            self._check_of("object store", services.ping_store()),
            self._check_of("Redis", services.ping_redis()),
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

    async def _check_of(self, service: str, ping: Awaitable[None]) -> Check:
        """The state of a service. The log gets one warning per outage and reason, however often it is asked."""
        try:
            await ping
        except Outage as error:
            if self._warned.get(service) != (reason := str(error)):
                self._warned[service] = reason
                # Not in the answer: it is public, and the reason names hosts.
                _log.warning("not ready: %s", reason)
            return Check(ok=False, detail=f"unavailable ({error.code}); see the gateway's log")
        if self._warned.pop(service, None) is not None:
            _log.info("%s is available again", service)
        return Check(ok=True)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Check that the process is alive")
async def healthz() -> dict[str, str]:
    """Checks no other service, as a restart of the gateway does not help an unavailable broker."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    response_model=Readiness,
    summary="Check that the gateway can accept tasks",
    responses={503: {"model": Readiness, "description": "The broker or the object store is unavailable"}},
)
async def readyz(request: Request) -> Response:
    """Without Redis the gateway is `degraded`: it still accepts tasks and answers results."""
    probe: ReadinessProbe = request.app.state.readiness
    readiness = await probe.readiness()
    code = 503 if readiness.status == "unavailable" else 200
    return Response(readiness.model_dump_json(), code, media_type="application/json")


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", summary="Get metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(services: ServicesDep) -> Response:
    """In Prometheus' text format."""
    return Response(services.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
