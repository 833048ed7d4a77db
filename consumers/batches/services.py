"""The services that the jobs of one process share: stores, index, publisher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property

from celery.signals import worker_shutting_down

from inferq.broker import BrokerSettings, Message, Publisher, topology_for
from inferq.consumers.batches.settings import BatchSettings
from inferq.schemas import installed_types
from inferq.storage import (
    BatchIndex,
    BatchStore,
    ObjectStore,
    ResultStore,
    StatusIndex,
    StorageSettings,
    open_store,
)
from inferq.storage.batches.sources import Sources


@dataclass(frozen=True)
class Pauses:
    """Seconds from one try to the next.

    `resend`: before a job that failed for the first time is done again; each further time it is twice as long.
    `rejected`: before tasks are sent again that a full queue rejected. `cancel_look`: from one look to the
    next for a cancel, while a source is read for the first time.
    """

    resend: float = 3.0
    rejected: float = 1.0
    cancel_look: float = 2.0


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class BatchServices:
    """Safe from many threads. `stopping` is set when the process shuts down."""

    settings: BatchSettings
    storage: StorageSettings
    broker: BrokerSettings
    pauses: Pauses = Pauses()
    clock: Callable[[], datetime] = utc_now
    stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls) -> BatchServices:
        """From the environment; does not connect. Raises InstallationError."""
        return cls(BatchSettings.load(), StorageSettings.load(), BrokerSettings.load())

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self.storage)

    @cached_property
    def results(self) -> ResultStore:
        return ResultStore(self.store)

    @cached_property
    def batches(self) -> BatchStore:
        return BatchStore(self.store)

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.store, self.batches, self.storage)

    @cached_property
    def status(self) -> StatusIndex:
        return StatusIndex.from_settings(self.storage)

    @cached_property
    def index(self) -> BatchIndex:
        return BatchIndex(self.status, lease_seconds=self.settings.batch_lease)

    @property
    def publisher(self) -> Publisher:
        """The publisher; its first use starts connecting."""
        with self._lock:
            return self._publisher

    @cached_property
    def _publisher(self) -> Publisher:
        publisher = Publisher(self.broker, name="batches", topology=topology_for(installed_types()))
        publisher.start()
        return publisher

    def confirm(self, message: Message) -> None:
        """Publish a message and wait for its confirm."""
        self.publisher.publish(message).result()

    def close(self) -> None:
        if "_publisher" in self.__dict__:
            self._publisher.close()


@cache
def load_services() -> BatchServices:
    """The process's services, from the environment. Raises InstallationError for a bad setting or a Redis Cluster.

    Loaded before the first job arrives, so that a bad setting ends the process at its start.
    """
    services = BatchServices.load()
    services.index, services.store  # noqa: B018 - reports a bad URL now
    services.status.require_supported()
    worker_shutting_down.connect(lambda **_: services.stopping.set(), weak=False)
    return services
