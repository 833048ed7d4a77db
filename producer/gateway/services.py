"""What the routes share: the settings, the stores, the publisher, and threads for blocking calls."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, Protocol, TypeVar

from anyio import CapacityLimiter, move_on_after, to_thread
from fastapi import Depends, Request

from inferq.broker.messages import Message
from inferq.producer.gateway.breaker import StoreBreaker
from inferq.producer.gateway.event_bus import EventBus
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.metrics import Metrics
from inferq.producer.gateway.paths import Paths
from inferq.producer.gateway.problems import ProblemError
from inferq.producer.gateway.settings import GatewaySettings
from inferq.producer.gateway.threads import Threads
from inferq.schemas import Batch, Task
from inferq.storage.batches.index import BatchIndex
from inferq.storage.batches.store import BatchStore
from inferq.storage.callbacks import CallbackRecords
from inferq.storage.figures import MonitorFigures
from inferq.storage.objects.results import ResultStore
from inferq.storage.objects.store import ObjectStore, StoreOutage
from inferq.storage.status.index import StatusIndex, StatusOutage
from inferq.storage.workers import WorkerRegistry

P = ParamSpec("P")
T = TypeVar("T")

_REDIS_THREADS = 32
_STORE_THREADS = 64
_REDIS_SECONDS = 15.0
PING_SECONDS = 5.0
_CACHED_BATCHES = 256


class TaskPublisher(Protocol):
    """The part of inferq.broker.publisher.Publisher that the gateway uses."""

    blocked_reason: str | None

    @property
    def connected(self) -> bool: ...

    def start(self) -> None: ...

    async def confirm(self, message: Message, *, timeout: float | None = None) -> None: ...

    def close(self, timeout: float = 5.0) -> None: ...


class BatchCache:
    """The records of unfinished batches, the most recently used; a record never changes.

    For the event loop's thread alone.
    """

    def __init__(self, limit: int = _CACHED_BATCHES) -> None:
        self._limit = limit
        self._batches: OrderedDict[tuple[str, str], Batch] = OrderedDict()

    def get(self, tenant: str, batch_id: str) -> Batch | None:
        batch = self._batches.get((tenant, batch_id))
        if batch is not None:
            self._batches.move_to_end((tenant, batch_id))
        return batch

    def drop(self, tenant: str, batch_id: str) -> None:
        self._batches.pop((tenant, batch_id), None)

    def keep(self, batch: Batch) -> None:
        name = (batch.tenant, batch.batch_id)
        self._batches[name] = batch
        self._batches.move_to_end(name)
        if len(self._batches) > self._limit:
            self._batches.popitem(last=False)


@dataclass(frozen=True)
class Services:
    """One gateway's services. `closing` is set when the gateway stops; event streams and waits end then.

    `unrecorded`: accepted tasks that Redis has no record of yet, because it was unavailable: by tenant and id, with
    their digests.

    Redis, the object store and uploads each have threads of their own, so that a slow one never delays the
    others.
    """

    settings: GatewaySettings
    paths: Paths
    keys: KeyFile
    status: StatusIndex
    store: ObjectStore
    results: ResultStore
    callbacks: CallbackRecords
    publisher: TaskPublisher
    event_bus: EventBus
    metrics: Metrics
    closing: asyncio.Event
    batches: BatchStore
    batch_index: BatchIndex
    figures: MonitorFigures
    workers: WorkerRegistry
    batch_cache: BatchCache = field(default_factory=BatchCache)
    store_breaker: StoreBreaker = field(default_factory=StoreBreaker)
    unrecorded: OrderedDict[tuple[str, str], tuple[Task, str]] = field(default_factory=OrderedDict)
    _redis_threads: Threads = field(init=False)
    _store_threads: Threads = field(init=False)
    _ping_threads: tuple[Threads, Threads] = field(init=False)
    _uploads: CapacityLimiter = field(init=False)
    _tenant_uploads: dict[str, CapacityLimiter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def threads(count: int, seconds: float, *, redis: bool) -> Threads:
            if redis:
                return Threads(count, name="Redis", seconds=seconds, outage=StatusOutage)
            return Threads(count, name="the object store", seconds=seconds, outage=StoreOutage)

        store_seconds = self.settings.gateway_store_timeout
        object.__setattr__(self, "_redis_threads", threads(_REDIS_THREADS, _REDIS_SECONDS, redis=True))
        object.__setattr__(self, "_store_threads", threads(_STORE_THREADS, store_seconds, redis=False))
        pings = tuple(threads(1, PING_SECONDS, redis=redis) for redis in (False, True))
        object.__setattr__(self, "_ping_threads", pings)
        object.__setattr__(self, "_uploads", CapacityLimiter(self.settings.max_uploads))

    async def on_redis(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking Redis call on a thread. Raises StatusOutage if it takes too long."""
        return await self._redis_threads.run(partial(call, *args, **kwargs))

    async def record_accepted(self, tenant: str, task_id: str) -> None:
        """Record an accepted task, if it is unrecorded. Raises StatusOutage.

        Called before Redis is asked about a task: Redis may be back, and then lacks it for up to a second.
        """
        unrecorded = self.unrecorded.get((tenant, task_id))
        if unrecorded is not None:
            await self.on_redis(self.status.confirm, *unrecorded)
            self.unrecorded.pop((tenant, task_id), None)

    async def on_store(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking object store call on a thread. Raises StoreOutage if it takes too long."""
        return await self._store_threads.run(partial(call, *args, **kwargs))

    async def ping_store(self) -> None:
        """Look whether the object store answers, on a thread of its own. Raises StoreOutage."""
        await self._ping_threads[0].run(self.store.ping)

    async def ping_redis(self) -> None:
        """Look whether Redis answers, on a thread of its own. Raises StatusOutage."""
        await self._ping_threads[1].run(self.status.ping)

    def close_threads(self) -> None:
        """Make no call any more that still waits for a thread."""
        for threads in (self._redis_threads, self._store_threads, *self._ping_threads):
            threads.close()

    async def try_store(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make an object store call that the gateway can do without.

        Raises StoreOutage after a short time, and at once while the store is slow.
        """
        return await self.store_breaker.run(partial(call, *args, **kwargs), self._store_threads)

    async def on_upload(self, tenant: str, call: Callable[[], T]) -> T:
        """Make a blocking call that lasts until its client has sent everything.

        One tenant's uploads take three quarters of the places at most. Raises ProblemError (503) if none is free
        within `body_timeout`.
        """
        own = self._tenant_uploads.setdefault(
            tenant, CapacityLimiter(self.settings.max_uploads - self.settings.max_uploads // 4)
        )
        try:
            async with AsyncExitStack() as places:
                with move_on_after(self.settings.body_timeout) as waiting:
                    await places.enter_async_context(own)
                    await places.enter_async_context(self._uploads)
                if waiting.cancelled_caught:
                    raise ProblemError(
                        503,
                        "uploads_busy",
                        "too many files are being uploaded; try again in 5 s",
                        headers={"Retry-After": "5", "Connection": "close"},
                    )
                return await to_thread.run_sync(call, limiter=CapacityLimiter(1))
        finally:
            if own.statistics().borrowed_tokens == own.statistics().tasks_waiting == 0:
                self._tenant_uploads.pop(tenant, None)


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(services_of)]
