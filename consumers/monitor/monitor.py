"""Reads the figures round by round, serves them as metrics, and leaves them in Redis for the gateway."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, make_wsgi_app
from pydantic import TypeAdapter, ValidationError

from inferq.broker import BrokerSettings, work_queue
from inferq.consumers.monitor.broker_figures import BrokerFigures, BrokerReader
from inferq.consumers.monitor.metrics import StatsCollector
from inferq.consumers.monitor.records import RecordFigures, RecordReader
from inferq.consumers.monitor.settings import MonitorSettings
from inferq.consumers.monitor.source import Reading, Source, Unknown
from inferq.consumers.monitor.stats import make_stats
from inferq.consumers.monitor.waiting import Arrivals, Waiting
from inferq.consumers.rounds import Rounds
from inferq.schemas import PRIORITIES, Outage, installed_types
from inferq.schemas.monitor import Lane, Service, Stats
from inferq.schemas.probe_server import ProbeServer, Readiness
from inferq.storage import BatchIndex, StatusIndex, StorageSettings, open_store
from inferq.storage.figures import MonitorFigures
from inferq.storage.status.usage import mean_seconds
from inferq.storage.workers import Registered, WorkerRegistry

_ROUNDS = 4
"""For how many rounds figures are believed."""
_PATIENCE_SECONDS = 3.0
"""How long a round waits for RabbitMQ and Redis. A reading that takes longer counts in a later round."""
_STORE_PATIENCE_SECONDS = 120.0
_MOST_TYPES = 200

_WAITING = TypeAdapter(dict[str, Arrivals])

_log = logging.getLogger(__name__)


class _RedisFigures(NamedTuple):
    workers: Registered
    given_up: int
    task_seconds: Mapping[str, float]


class Monitor:
    """Runs until `stop`. Two monitors do no harm: each has metrics of its own, and the last to save is read."""

    def __init__(
        self,
        settings: MonitorSettings,
        broker: BrokerSettings,
        storage: StorageSettings,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._rounds = Rounds()
        self._index = StatusIndex.from_settings(storage)
        self._kept = MonitorFigures(self._index)
        registry = WorkerRegistry(self._index)
        self._reader = BrokerReader(broker)
        records = RecordReader(open_store(storage), BatchIndex(self._index))
        every = settings.monitor_records_interval
        self._broker: Source[BrokerFigures] = Source(
            "RabbitMQ", lambda: self._reader.read(self._types), keeps=self._believed_for, clock=clock
        )
        self._redis: Source[_RedisFigures] = Source(
            "Redis",
            lambda: _RedisFigures(
                registry.read(),
                self._kept.callbacks_given_up(clock().timestamp()),
                self._read_task_seconds(),
            ),
            keeps=self._believed_for,
            clock=clock,
        )
        self._records: Source[RecordFigures] = Source(
            "the object store",
            records.read,
            keeps=_ROUNDS * every + _STORE_PATIENCE_SECONDS,
            clock=clock,
        )
        self._next_records = 0.0
        self._task_seconds: Mapping[str, float] = {}
        self._next_task_seconds = 0.0
        self._types: tuple[str, ...] = tuple(installed_types())
        self._waiting: dict[str, Waiting] | None = None
        self._looked: tuple[datetime, datetime] | None = None
        self._oldest: dict[Lane, float] = {}
        self._stats: Stats | None = None
        self._made_at = 0.0
        self.last_success: float | None = None
        self.registry = CollectorRegistry()
        self.registry.register(StatsCollector(lambda: self.stats, lambda: self.last_success))
        self.probes: ProbeServer | None = None
        if settings.probe_port is not None:
            self.probes = ProbeServer(
                settings.probe_host,
                settings.probe_port,
                readiness=self.readiness,
                metrics=make_wsgi_app(self.registry),
            )

    @property
    def stats(self) -> Stats | None:
        """The figures of the last round; None once they are too old."""
        fresh = time.monotonic() - self._made_at <= self._believed_for
        return self._stats if fresh else None

    @property
    def _believed_for(self) -> float:
        return _ROUNDS * (self._settings.monitor_interval + _PATIENCE_SECONDS)

    def run(self) -> None:
        """Read round by round, until stopped. Raises InstallationError for a Redis that cannot be used."""
        self._index.require_supported()
        self.start()
        if self.probes is not None:
            self.probes.start()
        try:
            self._rounds.run(self.round, self._settings.monitor_interval)
        finally:
            if self.probes is not None:
                self.probes.close()

    def start(self) -> None:
        """Start the threads that read. `run` does."""
        for source in (self._broker, self._redis, self._records):
            source.start()

    def stop(self) -> None:
        """End `run` after the present round. A signal handler may call it."""
        self._rounds.stop()

    def readiness(self) -> Readiness:
        """Ready after the first round, unless a service is unavailable. Unknown does not count as unavailable."""
        stats = self.stats
        if stats is None:
            return Readiness(False, ("the first round",))
        away = tuple(name for name, up in (stats.services or {}).items() if not up)
        return Readiness(not away, away)

    def round(self) -> None:
        """Read all figures once; an unavailable service makes its own figures unknown, and no others."""
        if time.monotonic() >= self._next_records:
            self._next_records = time.monotonic() + self._settings.monitor_records_interval
            self._records.ask()
        # At once, because the age of a message comes from both.
        self._broker.ask()
        self._redis.ask()
        broker = self._broker.figures(_PATIENCE_SECONDS)
        redis = self._redis.figures(_PATIENCE_SECONDS)
        records = self._records.figures(0 if self._stats is not None else _PATIENCE_SECONDS)
        workers = redis if isinstance(redis, Unknown) else redis.figures.workers
        self._note_types(workers)
        self._look(broker, redis)
        read: dict[Service, Reading[Any] | Unknown] = {"rabbitmq": broker, "redis": redis, "store": records}
        self._stats = make_stats(
            at=self._clock(),
            task_types=self._types,
            broker=broker if isinstance(broker, Unknown) else broker.figures,
            workers=workers,
            given_up=redis if isinstance(redis, Unknown) else redis.figures.given_up,
            task_seconds=redis if isinstance(redis, Unknown) else redis.figures.task_seconds,
            records=records if isinstance(records, Unknown) else records.figures,
            oldest=self._oldest,
            read_at={name: found.at for name, found in read.items() if not isinstance(found, Unknown)},
        )
        self._made_at = time.monotonic()
        if not isinstance(broker, Unknown):
            self.last_success = broker.at.timestamp()
        self._save(self._stats)

    def _read_task_seconds(self) -> Mapping[str, float]:
        """What a task takes, read once in a while: a day's usage has an entry for each tenant and type."""
        if time.monotonic() >= self._next_task_seconds:
            today = self._clock().date()
            self._task_seconds = mean_seconds(self._index.usage((today - timedelta(days=1), today)))
            self._next_task_seconds = time.monotonic() + self._settings.monitor_records_interval
        return self._task_seconds

    def _note_types(self, workers: Registered | Unknown) -> None:
        """From the next round on, also read the queues of types that only workers know."""
        if not isinstance(workers, Unknown):
            known = dict.fromkeys((*installed_types(), *(worker.task_type for worker in workers.workers)))
            self._types = tuple(dict.fromkeys((*self._types, *known)))[:_MOST_TYPES]

    def _look(
        self, broker: Reading[BrokerFigures] | Unknown, redis: Reading[_RedisFigures] | Unknown
    ) -> None:
        """Note how long the first message of each lane has waited; needs new figures of both."""
        if isinstance(broker, Unknown) or isinstance(redis, Unknown):
            self._oldest = {}
            return
        if self._looked is not None and (broker.at == self._looked[0] or redis.at == self._looked[1]):
            return
        self._looked = broker.at, redis.at
        if self._waiting is None:
            self._waiting = self._load_waiting()
        now, queues, workers = broker.at.timestamp(), broker.figures.queues, redis.figures.workers
        found: dict[Lane, float] = {}
        for task_type in self._types:
            for priority in PRIORITIES:
                name = work_queue(task_type, priority)
                if (count := queues.get(name)) is None:
                    continue
                if not workers.explain(count.consumers, task_type, priority):
                    # Deliveries go uncounted: what is known of the queue is worth nothing afterwards.
                    self._waiting.pop(name, None)
                else:
                    waiting = self._waiting.setdefault(name, Waiting())
                    taken = workers.taken_of(task_type, priority)
                    requeued = workers.requeued_of(task_type, priority)
                    found[task_type, priority] = round(waiting.look(now, count.ready, taken, requeued), 1)
        self._oldest = found

    def _load_waiting(self) -> dict[str, Waiting]:
        """What the last monitor knew."""
        try:
            text = self._kept.waiting()
            known = {} if text is None else _WAITING.validate_json(text)
        except (Outage, ValidationError):
            return {}
        return {name: Waiting(arrivals) for name, arrivals in known.items()}

    def _save(self, stats: Stats) -> None:
        lanes = (self._waiting or {}).items()
        waiting = {name: known for name, lane in lanes if (known := lane.known()) is not None}
        try:
            text = _WAITING.dump_json(waiting).decode()
            self._kept.save(stats, text, seconds=self._believed_for)
        except Outage as error:
            _log.debug("the figures are not saved for the gateway: %s", error)
