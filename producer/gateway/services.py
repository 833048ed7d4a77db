"""What the routes work with: the settings, the stores, the publisher, and how blocking calls are made."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, Protocol, TypeVar

from anyio import CapacityLimiter, move_on_after, to_thread
from fastapi import Depends, Request

from inferq.broker.messages import Message
from inferq.producer.gateway.event_bus import EventBus
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.metrics import Metrics
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import Batch
from inferq.storage.batches.index import BatchIndex
from inferq.storage.batches.store import BatchStore
from inferq.storage.callbacks import CallbackRecords
from inferq.storage.objects.results import ResultStore
from inferq.storage.objects.store import ObjectStore, StoreOutage
from inferq.storage.status.index import StatusIndex

P = ParamSpec("P")
T = TypeVar("T")

_REDIS_THREADS = 32
_STORE_THREADS = 64
_KNOWN_BATCHES = 256
_GLANCE_SECONDS = 2.0
_SLOW_SECONDS = 10.0
"""How long an object store that took longer than a glance may is not asked for what can be done without."""
_TAKES_LONG = "the object store takes long to answer"


class TaskPublisher(Protocol):
    """What the gateway needs of inferq.broker.publisher.Publisher."""

    blocked_reason: str | None

    @property
    def connected(self) -> bool: ...

    def start(self) -> None: ...

    async def confirm(self, message: Message, *, timeout: float | None = None) -> None: ...

    def close(self, timeout: float = 5.0) -> None: ...


class KnownBatches:
    """The records of batches that were asked for and had not ended; they never change.

    For the event loop's thread alone.
    """

    def __init__(self, limit: int = _KNOWN_BATCHES) -> None:
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


@dataclass
class _Slow:
    """Until when the object store is taken for slow, on the monotonic clock; 0 where it is not."""

    until: float = 0.0


@dataclass(frozen=True)
class Services:
    """One gateway's surroundings. `closing` is set when it stops: whoever waits for long ends then.

    Calls to Redis, to the object store and uploads each have threads of their own, so that a slow one of
    them never holds up the others.
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
    known_batches: KnownBatches = field(default_factory=KnownBatches)
    _slow: _Slow = field(default_factory=_Slow)
    _redis_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_REDIS_THREADS))
    _store_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_STORE_THREADS))
    _upload_threads: CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_upload_threads", CapacityLimiter(self.settings.max_uploads))

    async def on_redis(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking call to Redis on a thread."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._redis_threads)

    async def on_store(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking call to the object store on a thread."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._store_threads)

    async def glance(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call to the object store whose answer can be done without: it is waited for a moment only.

        Raises StoreOutage after that, and from then on at once, but for one call in a while that tries.
        """
        slow = self._slow
        if (now := time.monotonic()) < slow.until:
            raise StoreOutage(_TAKES_LONG)
        if slow.until:
            slow.until = now + _SLOW_SECONDS
        with move_on_after(_GLANCE_SECONDS) as scope:
            whole = partial(call, *args, **kwargs)
            try:
                return await to_thread.run_sync(whole, limiter=self._store_threads, abandon_on_cancel=True)
            finally:
                if not scope.cancel_called:
                    slow.until = 0.0
        slow.until = time.monotonic() + _SLOW_SECONDS
        raise StoreOutage(_TAKES_LONG)

    async def on_upload(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call that lasts as long as a client takes to send."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._upload_threads)

    def task_url(self, task_id: str) -> str:
        return f"{self.api_url}{task_path(task_id)}"


def task_path(task_id: str) -> str:
    """The path of a task's own resource. `.` and `..` are ids too, and must not be taken for folders."""
    return f"/v1/tasks/{'%2E' * len(task_id) if task_id in ('.', '..') else task_id}"


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(services_of)]
