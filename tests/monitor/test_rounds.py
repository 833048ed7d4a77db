"""Rounds of the monitor with fake services: its figures, and which of them the next round keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from inferq.broker import BrokerSettings, BrokerUnavailable
from inferq.consumers.monitor.broker_figures import DELAY_QUEUES, BrokerFigures, BrokerReader, QueueCount
from inferq.consumers.monitor.monitor import Monitor, _RedisFigures
from inferq.consumers.monitor.settings import MonitorSettings
from inferq.schemas.monitor import QueueFigures, Stats, WorkerInfo
from inferq.storage import StorageSettings
from inferq.storage.workers import Registered
from tests.monitor.conftest import NOBODY
from tests.waiting import eventually


def worker(**fields: Any) -> WorkerInfo:
    about = {
        "worker_id": "w-1", "name": "w", "host": "h", "pid": 1, "task_type": "echo", "lanes": ("normal",),
        "state": "busy", "slots": 1, "busy": 1, "version": "0", "since": datetime.now(UTC),
    }  # fmt: skip
    return WorkerInfo.model_validate({**about, **fields})


class Site:
    """A monitor of one lane, with services that answer what the test says."""

    def __init__(self, store: Path) -> None:
        self.now = datetime(2026, 11, 30, tzinfo=UTC)
        self.ready = self.consumers = 0
        self.taken: dict[str, int] = {}
        self.workers: tuple[WorkerInfo, ...] = ()
        self.broker_answers = threading.Event()
        self.store_answers = threading.Event()
        self.broker_answers.set()
        self.broker_fault: Exception | None = None
        self.monitor = monitor = Monitor(
            MonitorSettings(),
            BrokerSettings(amqp_url=f"amqp://{NOBODY}/"),
            StorageSettings(redis_url=f"redis://{NOBODY}/0", store_url=store.as_uri()),
            clock=lambda: self.now,
        )
        read: Callable[[], Any] = monitor._records._read
        monitor._broker._read = self._read_broker
        monitor._redis._read = lambda: _RedisFigures(Registered(self.workers, dict(self.taken)), 0, {})
        monitor._records._read = lambda: (self.store_answers.wait(60), read())[1]
        monitor._kept.save = lambda *_, **__: None  # type: ignore[method-assign]
        monitor.start()

    def _read_broker(self) -> BrokerFigures:
        ready = self.ready
        self.broker_answers.wait(60)
        if self.broker_fault is not None:
            raise self.broker_fault
        return BrokerFigures({"inference.echo.normal": QueueCount(ready, self.consumers)}, ())

    def stats(self, seconds: float = 5) -> Stats:
        """The figures of a round that is made this long after the last one."""
        self.now += timedelta(seconds=seconds)
        self.monitor.round()
        assert self.monitor.stats is not None
        return self.monitor.stats

    def lane(self, seconds: float = 5) -> QueueFigures:
        stats = self.stats(seconds)
        assert stats.queues is not None
        return next(q for q in stats.queues if (q.task_type, q.priority) == ("echo", "normal"))


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how long a round waits for a reading in progress."""
    return lambda seconds: monkeypatch.setattr("inferq.consumers.monitor.monitor._PATIENCE_SECONDS", seconds)


@pytest.fixture
def site(tmp_path: Path, patience: Callable[[float], None]) -> Iterator[Site]:
    patience(30)
    site = Site(tmp_path)
    yield site
    site.broker_answers.set()
    site.store_answers.set()


def test_deliveries_that_nobody_counts_make_no_message_old(site: Site) -> None:
    site.store_answers.set()
    site.ready, site.workers, site.consumers = 10, (worker(in_hand={"normal": 1}),), 1
    assert (site.lane().oldest_seconds, site.lane().oldest_seconds) == (0, 5)
    # A worker without heartbeats takes as many as arrive: no count changes.
    for workers, consumers in (((), 1), ((worker(),), 2), ((worker(lanes=("high",)),), 1)):
        site.workers, site.consumers = workers, consumers
        lane = site.lane(7200)
        assert (lane.ready, lane.unacked, lane.oldest_seconds) == (10, None, None)
    stats = site.stats()
    reason = "consumers without a heartbeat in Redis take tasks: echo normal"
    assert {name: stats.unknown.get(name) for name in ("unacked", "oldest_seconds")} == dict.fromkeys(
        ("unacked", "oldest_seconds"), reason
    )
    site.workers, site.consumers = (worker(consumers=2),), 2  # it takes a task ahead
    lane = site.lane()
    assert (lane.unacked, lane.oldest_seconds) == (0, 0), "what came before is not carried on"
    assert site.lane().oldest_seconds == 5


def test_a_store_that_was_not_read_yet_is_neither_up_nor_down(
    site: Site, patience: Callable[[float], None]
) -> None:
    patience(0.1)
    eventually(lambda: site.stats().services == {"rabbitmq": True, "redis": True})
    stats = site.stats()
    assert stats.unknown["batches"] == "the object store has not been read yet"
    assert site.monitor.readiness().ready
    site.store_answers.set()
    eventually(lambda: site.stats().services == {"rabbitmq": True, "redis": True, "store": True})


def test_over_a_slow_link_the_last_figures_are_told_with_their_time(
    site: Site, patience: Callable[[float], None]
) -> None:
    site.store_answers.set()
    site.ready = 3
    site.lane()
    first = site.now
    site.broker_answers.clear()
    patience(0.1)
    stats = [site.stats() for _ in range(2)][-1]
    assert stats.services is not None
    assert stats.services["rabbitmq"]
    assert stats.read_at is not None
    assert (stats.read_at["rabbitmq"], stats.at) == (first, first + timedelta(seconds=10))
    assert site.monitor.last_success == first.timestamp()
    assert site.lane(0).oldest_seconds == 0, "no second look at the same counts"
    site.ready = 4
    site.broker_answers.set()
    eventually(lambda: site.lane().ready == 4)


def test_a_service_is_down_only_in_an_outage(site: Site) -> None:
    site.store_answers.set()
    for fault, services in (
        (BrokerUnavailable("away"), {"rabbitmq": False, "redis": True, "store": True}),
        (ValueError("a bug"), {"redis": True, "store": True}),
    ):
        site.broker_fault = fault
        site.stats()
        assert site.stats().services == services
        assert site.monitor.readiness().ready == ("rabbitmq" not in services)


def test_delay_levels_are_read_once_in_a_while() -> None:
    read: list[str] = []
    reader: Any = BrokerReader(BrokerSettings())

    def counts(names: Iterable[str]) -> dict[str, QueueCount]:
        asked = list(names)
        read.extend(asked)
        return dict.fromkeys(asked, QueueCount(len(read), 0))

    reader._counts = counts
    reader._alarms.ask = tuple
    first = reader.read(["echo"]).queues
    asked = len(read)
    for _ in range(5):
        found = reader.read(["echo"]).queues
        assert found.keys() == first.keys()
        assert {name for name in found if found[name] == first[name]} == set(DELAY_QUEUES)
    assert len(read) - asked == 5 * (asked - len(DELAY_QUEUES))
    assert reader.read(["echo"]).queues[DELAY_QUEUES[0]] != first[DELAY_QUEUES[0]]


def test_delay_levels_that_are_declared_after_the_first_reading_are_read_at_the_next() -> None:
    reader: Any = BrokerReader(BrokerSettings())
    declared = False

    def counts(names: Iterable[str]) -> dict[str, QueueCount]:
        return {name: QueueCount(0, 0) for name in names if declared or name not in DELAY_QUEUES}

    reader._counts = counts
    reader._alarms.ask = tuple
    assert DELAY_QUEUES[0] not in reader.read(["echo"]).queues
    declared = True
    assert DELAY_QUEUES[0] in reader.read(["echo"]).queues
