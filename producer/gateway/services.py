"""What the routes share: the settings, the stores, the publisher, and threads for blocking calls."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, Protocol, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request

from inferq.broker.messages import Message
from inferq.producer.gateway.breaker import StoreBreaker
from inferq.producer.gateway.event_bus import EventBus
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.metrics import Metrics
from inferq.producer.gateway.paths import task_path
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import Batch
from inferq.storage.batches.index import BatchIndex
from inferq.storage.batches.store import BatchStore
from inferq.storage.callbacks import CallbackRecords
from inferq.storage.objects.results import ResultStore
from inferq.storage.objects.store import ObjectStore
from inferq.storage.status.index import StatusIndex

P = ParamSpec("P")
T = TypeVar("T")

_REDIS_THREADS = 32
_STORE_THREADS = 64
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

    Redis, the object store and uploads each have threads of their own, so that a slow one never delays the
    others.
    """

    settings: GatewaySettings
    api_url: str
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
    batch_cache: BatchCache = field(default_factory=BatchCache)
    store_breaker: StoreBreaker = field(default_factory=StoreBreaker)
    _redis_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_REDIS_THREADS))
    _store_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_STORE_THREADS))
    _upload_threads: CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_upload_threads", CapacityLimiter(self.settings.max_uploads))

    async def on_redis(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking Redis call on a thread."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._redis_threads)

    async def on_store(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking object store call on a thread."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._store_threads)

    async def try_store(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make an object store call that the gateway can do without.

        Raises StoreOutage after a short time, and at once while the store is slow.
        """
        return await self.store_breaker.run(partial(call, *args, **kwargs), self._store_threads)

    async def on_upload(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking call that lasts until its client has sent everything."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._upload_threads)

    def task_url(self, task_id: str) -> str:
        return f"{self.api_url}{task_path(task_id)}"


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(services_of)]
