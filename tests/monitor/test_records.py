"""Batches and nights by state and lateness, from their records."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from inferq.consumers.monitor import records
from inferq.consumers.monitor.records import RecordReader
from inferq.schemas import Batch, BatchCounts, BatchState, BatchSummary
from inferq.schemas.schedule import Schedule, run_id_of
from inferq.storage import BatchIndex, BatchStore, LocalStore, ObjectStore, StatusOutage
from inferq.storage.nightly_runs import Run, RunLog

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


class Index:
    """The states that Redis knows, or None while it is unavailable."""

    def __init__(self) -> None:
        self.known: dict[str, BatchState] | None = {}
        self.left: dict[str, int | None] = {}

    def states(self, names: list[tuple[str, str]]) -> list[BatchState | None]:
        if self.known is None:
            raise StatusOutage("away")
        return [self.known.get(batch_id) for _, batch_id in names]

    def unfed(self, names: list[tuple[str, str]]) -> list[int | None]:
        return [self.left.get(batch_id) for _, batch_id in names]


class Site:
    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.batches = BatchStore(store)
        self.index = Index()
        self.now = NOON
        self.reader = RecordReader(store, cast(BatchIndex, self.index), clock=lambda: self.now)

    def batch(self, batch_id: str, *, tenant: str = "default", hours_ago: float = 1, **more: Any) -> None:
        at = NOON - timedelta(hours=hours_ago)
        self.batches.create(Batch(batch_id=batch_id, tenant=tenant, source="inferq:x", created_at=at, **more))

    def end(self, batch_id: str, state: Any, *, tenant: str = "default", at: datetime | None = None) -> None:
        self.batches.finish(
            BatchSummary(
                batch_id=batch_id, tenant=tenant, state=state, counts=BatchCounts(), seconds=1, tasks_per_second=1,
                created_at=NOON, finished_at=at or self.now,
            )
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        figures = self.reader.read()
        assert figures.batches is not None
        return {state: count for state, count in figures.batches.items() if count}


@pytest.fixture
def site(tmp_path: Any) -> Site:
    return Site(LocalStore(tmp_path / "store", fsync=False))


def test_batches_of_all_tenants_are_counted_by_state(site: Site) -> None:
    closed = {"start": "22:00", "end": "06:00"}
    site.batch("a")
    site.batch("b", tenant="t~1".replace("~", "-"))
    site.batch("c", window=closed)
    site.batch("old", hours_ago=30 * 24 + 1)
    site.batch("d")
    site.end("d", "failed")
    site.index.known = {"b": "running", "d": "failed"}
    assert site.counts() == {"feeding": 1, "running": 1, "paused": 1, "failed": 1}
    site.index.known = None
    figures = site.reader.read()
    assert (figures.batches, figures.nights, figures.redis) == (None, None, False)
    site.index.known = {"a": "completed"}  # Redis knows it before the summary is written
    assert site.counts() == {"finishing": 1, "feeding": 1, "paused": 1, "failed": 1}
    site.now += timedelta(hours=25)
    site.end("a", "completed")
    assert site.counts() == {"completed": 1, "feeding": 1, "paused": 1}


def test_the_lines_to_feed_are_counted_by_type_while_the_window_is_open(site: Site) -> None:
    night = {"start": "22:00", "end": "06:00"}
    site.batch("pages", task_type="ocr")
    site.batch("texts", defaults={"task_type": "ner"})
    site.batch("mixed")
    site.batch("more", task_type="ocr")
    site.batch("fed", task_type="ocr")
    site.batch("at-night", task_type="ocr", window=night)
    site.index.known = dict.fromkeys(("pages", "texts", "mixed", "more"), "feeding") | {"fed": "running"}  # type: ignore[assignment]
    site.index.left = {"pages": 5, "texts": 7, "mixed": 2, "more": 1, "fed": 90, "at-night": 90}
    assert site.reader.read().unfed == {"ocr": 6, "ner": 7, "*": 2}
    site.index.left["more"] = None
    assert site.reader.read().unfed is None, "Redis has lost a batch, and it is being counted"
    site.index.known = None
    assert site.reader.read().unfed is None


def test_what_has_ended_is_looked_up_once_and_a_reading_is_bounded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MOST_LOOKS", 3)
    for number in range(5):
        site.batch(f"b{number}", hours_ago=1 + number)
        site.end(f"b{number}", "completed")
    read: list[str] = []
    real = site.store.get
    monkeypatch.setattr(site.store, "get", lambda key: (read.append(key), real(key))[1])
    assert site.reader.read().batches is None, "not every batch was looked at"
    assert len(read) == 6
    assert site.counts() == {"completed": 5}
    read.clear()
    assert site.counts() == {"completed": 5}
    assert read == []


def night(site: Site, name: str, *, since: timedelta, window: str | None = None) -> tuple[RunLog, Schedule]:
    schedule = Schedule(name=name, cron="0 10 * * *", source="s3://b/in/", task_type="echo", window=window)
    log = RunLog(site.store, "default", name)
    log.know(NOON - since, schedule)
    return log, schedule


def start(log: RunLog, schedule: Schedule, at: datetime) -> str:
    run_id = run_id_of(schedule.name, at)
    log.claim(Run(run_id=run_id, scheduled_at=at, schedule=schedule))
    return run_id


def late(site: Site) -> dict[str, float]:
    return {night.schedule: night.seconds for night in site.reader.read().late_nights}


def test_a_run_that_does_not_start_is_late_from_its_time_on(site: Site) -> None:
    log, schedule = night(site, "n", since=timedelta(days=1))
    night(site, "new", since=timedelta(minutes=5))
    assert late(site) == {"n": 7200, "new": 0}
    start(log, schedule, NOON - timedelta(hours=2))
    assert late(site) == {"n": 0, "new": 0}
    site.now += timedelta(hours=22, seconds=10)
    assert late(site) == {"n": 10, "new": 10}


def test_a_run_is_late_from_the_close_of_its_window_until_its_end(site: Site) -> None:
    log, schedule = night(site, "n", since=timedelta(days=1), window="10:00-11:30")
    run_id = start(log, schedule, NOON - timedelta(hours=2))
    assert late(site) == {"n": 1800}
    assert site.reader.read().nights == {"paused": 1}
    site.now -= timedelta(hours=1)
    assert late(site) == {"n": 0}
    site.now += timedelta(hours=1)
    site.end(run_id, "completed")
    figures = site.reader.read()
    assert figures.late_nights[0].seconds == 0
    assert figures.nights == {"completed": 1}


def test_readings_write_nothing(site: Site, keys_listed: Callable[[ObjectStore], list[str]]) -> None:
    site.batch("a")
    night(site, "n", since=timedelta(days=1))
    before = {info.key: info.modified for info in site.store.list()}
    listed = keys_listed(site.store)
    site.reader.read()
    assert len(listed) < 12
    assert {info.key: info.modified for info in site.store.list()} == before
