"""The HTTP gateway as an ASGI application."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from inferq.broker.publisher import Publisher
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import topology_for
from inferq.producer.gateway import (
    batches,
    callbacks,
    events,
    files,
    health,
    openapi,
    operations,
    problems,
    tasks,
)
from inferq.producer.gateway.access import Access
from inferq.producer.gateway.breaker import StoreBreaker
from inferq.producer.gateway.connections import RefusedConnections
from inferq.producer.gateway.event_bus import EventBus
from inferq.producer.gateway.health import ReadinessProbe
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.metrics import Metrics
from inferq.producer.gateway.paths import Paths
from inferq.producer.gateway.services import Services, TaskPublisher
from inferq.producer.gateway.settings import GatewaySettings
from inferq.producer.gateway.submission import Submitter
from inferq.schemas import installed_types
from inferq.storage.batches.index import BatchIndex
from inferq.storage.batches.store import BatchStore
from inferq.storage.callbacks import CallbackRecords
from inferq.storage.figures import MonitorFigures
from inferq.storage.objects.open import open_store
from inferq.storage.objects.results import ResultStore
from inferq.storage.settings import StorageSettings
from inferq.storage.status.index import StatusIndex
from inferq.storage.workers import WorkerRegistry

_CLOSE_SECONDS = 5.0


def create_app(
    settings: GatewaySettings | None = None,
    *,
    storage: StorageSettings | None = None,
    broker: BrokerSettings | None = None,
    publisher: TaskPublisher | None = None,
    store_breaker: StoreBreaker | None = None,
) -> FastAPI:
    """The gateway. Settings that are not given come from the environment.

    It starts even if a service is unavailable, but refuses a Redis Cluster. `app.state.services.closing`, once
    set, ends event streams and waiting requests; the server sets it when it stops. `store_breaker` bounds the
    object store reads that submissions can do without.
    Raises InstallationError for invalid settings.
    """
    settings = settings or GatewaySettings.load()
    storage = storage or StorageSettings.load()
    if publisher is None:
        topology = topology_for(installed_types())
        publisher = Publisher(broker or BrokerSettings.load(), name="gateway", topology=topology)
    store = open_store(storage)
    keys = KeyFile(settings.api_keys_file)
    keys.list()  # an unreadable file fails the start, not the first request
    metrics = Metrics()
    status = StatusIndex.from_settings(storage)
    status.require_supported()
    services = Services(
        settings=settings,
        paths=Paths(storage.api_url),
        keys=keys,
        status=status,
        store=store,
        results=ResultStore(store),
        callbacks=CallbackRecords(store, status),
        publisher=publisher,
        event_bus=EventBus(storage.redis_url, timeout=storage.redis_timeout),
        metrics=metrics,
        closing=asyncio.Event(),
        batches=BatchStore(store),
        batch_index=BatchIndex(status),
        figures=MonitorFigures(status),
        workers=WorkerRegistry(status),
        store_breaker=store_breaker or StoreBreaker(),
    )
    app = FastAPI(
        title="inferq",
        version=version("inferq"),
        description="A distributed task queue for AI inference.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        root_path_in_servers=False,
        servers=[{"url": storage.api_url.rstrip("/")}],
        generate_unique_id_function=openapi.operation_id,
        **openapi.ABOUT,
    )
    app.state.services = services
    app.state.submitter = Submitter(services)
    app.state.readiness = ReadinessProbe(services)
    routers = [part.router for part in (tasks, batches, callbacks, events, files, operations, health)]
    problems.register(app, [route for router in routers for route in router.routes])
    app.add_middleware(RefusedConnections)  # within Access, which logs and counts every request
    app.add_middleware(Access, metrics=metrics, root_path=services.paths.root_path)
    if settings.trusted_proxies:
        app.add_middleware(
            ProxyHeadersMiddleware, trusted_hosts=[str(each) for each in settings.trusted_proxies]
        )
    for router in routers:
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign] # the way FastAPI documents
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi.build(app)
    return app.openapi_schema


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.publisher.start()
    services.event_bus.start()
    gc.freeze()  # loaded modules stay: collections that scan them would delay answers
    try:
        yield
    finally:
        services.closing.set()
        services.batches.close()
        services.event_bus.wake()
        await app.state.submitter.finish()
        await services.event_bus.close()
        await to_thread.run_sync(services.publisher.close, _CLOSE_SECONDS)
        services.close_threads()
        await to_thread.run_sync(services.status.close)
