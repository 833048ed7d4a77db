"""The list of a tenant's batches: its order, its cost, and batches that an older version recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from inferq.schemas import Batch
from inferq.schemas.encoding import to_json
from inferq.storage import BatchStore, ObjectInfo, ObjectStore
from inferq.storage.batches import times
from inferq.storage.batches.times import Created
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.s3 import S3Store
from inferq.storage.objects.store import StoreOutage

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def batch(number: int, *, batch_id: str | None = None, hours: float | None = None) -> Batch:
    """A batch created `hours` after noon; without them, batch by batch an hour later."""
    at = NOON + timedelta(hours=number if hours is None else hours)
    # The ids are in another order than the times.
    return Batch(batch_id=batch_id or f"{number * 7 % 10}-{number}", source="inferq:x", created_at=at)


def recorded_by_an_older_version(store: ObjectStore, batch: Batch) -> None:
    store.put(f"batches/default/{batch.batch_id}/batch.json", to_json(batch).encode())


def every_page(batches: BatchStore, limit: int) -> list[str]:
    """The ids of all batches, page by page."""
    found: list[Created] = []
    while page := batches.newest("default", before=found[-1] if found else None, limit=limit):
        assert len(page) <= limit
        found += page
    return [entry.batch_id for entry in found]


Cost = Callable[[Callable[[], object]], tuple[int, int]]


@pytest.fixture
def cost(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Cost:
    """How many requests a call makes, and how many keys their answers list."""
    requests, keys = [0], [0]
    if isinstance(store, S3Store):

        def answered(parsed: dict[str, Any], **_: object) -> None:
            requests[0] += 1
            keys[0] += len(parsed.get("Contents", ()))

        store._client.meta.events.register("after-call.s3", answered)
    else:
        for name in ("get", "create", "stat", "put"):
            _count_calls(store, name, requests, monkeypatch)
        real = store.list

        def listed(*args: Any, **kwargs: Any) -> Iterator[ObjectInfo]:
            requests[0] += 1
            for info in real(*args, **kwargs):
                keys[0] += 1
                yield info

        monkeypatch.setattr(store, "list", listed)

    def measure(call: Callable[[], object]) -> tuple[int, int]:
        requests[0] = keys[0] = 0
        call()
        return requests[0], keys[0]

    return measure


def _count_calls(store: ObjectStore, name: str, count: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(store, name)

    def call(*args: Any, **kwargs: Any) -> object:
        count[0] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(store, name, call)


def test_a_page_costs_the_same_however_many_batches_of_whatever_size_there_are(
    store: ObjectStore, cost: Cost
) -> None:
    batches = BatchStore(store)
    few, objects = (40, 20) if isinstance(store, LocalStore) else (15, 1)
    costs = []
    for count in (few, 3 * few):
        for number in range(0 if count == few else few, count):
            made = batches.create(batch(number))
            for other in range(objects):
                store.put(f"batches/default/{made.batch_id}/callbacks/{other}.json", b"")
        old = Created.of(batch(count - 4).batch_id, batch(count - 4).created_at)
        for before in (None, old):
            costs.append(
                cost(lambda before=before: batches.newest("default", before=before, limit=10))  # type: ignore[misc]
            )
    assert costs == [(2, 10)] * 4


def test_batches_are_listed_newest_first_in_pages_of_any_length(store: ObjectStore) -> None:
    batches = BatchStore(store)
    made = [batches.create(batch(number)).batch_id for number in range(0, 60, 12)]
    for second in (0, 1):  # at the same time: in any order, but each once
        made.append(batches.create(batch(0, batch_id=f"same{second}", hours=100)).batch_id)
    assert batches.create(batch(12).model_copy(update={"created_at": NOON + timedelta(days=9)})) == batch(12)
    for limit in (2, 3, 200):
        found = every_page(batches, limit)
        assert sorted(found[:2]) == ["same0", "same1"]
        assert found[2:] == made[-3::-1]
    assert batches.newest("another", limit=5) == []


def test_batches_of_an_older_version_are_added_once(store: ObjectStore, cost: Cost) -> None:
    older = [batch(number) for number in range(5)]
    for each in older:
        recorded_by_an_older_version(store, each)
        store.put(f"batches/default/{each.batch_id}/input/batch.json", b"")
    batches = BatchStore(store)
    newer = [batches.create(batch(number)) for number in (5, 6)]
    ids = [each.batch_id for each in (*older, *newer)][::-1]
    assert cost(lambda: batches.newest("default", limit=3))[0] > len(older)
    assert every_page(batches, 3) == ids
    again = BatchStore(store)
    assert cost(lambda: again.newest("default", limit=3)) == (2, 3)


def test_a_list_that_is_being_made_delays_no_other_tenant(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(times, "_WAIT_SECONDS", 0.01)
    for tenant in ("default", "another"):
        local_store.put(f"batches/{tenant}/b/batch.json", to_json(batch(1)).encode())
    batch_times, entered, released = times.BatchTimes(local_store), threading.Event(), threading.Event()

    def load(tenant: str, _batch_id: str) -> Batch:
        if tenant == "default":
            entered.set()
            released.wait(20)
        return batch(1)

    page = partial(batch_times.newest, before=None, limit=5, load=load)
    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(page, "default")
        try:
            assert entered.wait(20)
            assert len(page("another")) == 1
            with pytest.raises(StoreOutage, match="for the first time"):
                page("default")
        finally:
            released.set()
        assert len(making.result(20)) == 1


def test_a_list_that_is_being_made_is_left_at_a_close_and_made_by_the_next(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(times, "_CHUNK", 2)
    for number in range(9):
        recorded_by_an_older_version(local_store, batch(number))
    batch_times, loaded = times.BatchTimes(local_store), []

    def load(_tenant: str, batch_id: str) -> Batch:
        loaded.append(batch_id)
        batch_times.close()
        return batch(1, batch_id=batch_id)

    with pytest.raises(StoreOutage, match="stops"):
        batch_times.newest("default", before=None, limit=5, load=load)
    assert len(loaded) == 2
    assert len(every_page(BatchStore(local_store), 5)) == 9


def test_a_record_that_cannot_be_read_hides_no_other_batch(
    local_store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    recorded_by_an_older_version(local_store, batch(1))
    local_store.put("batches/default/spoilt/batch.json", b"{")
    assert every_page(BatchStore(local_store), 5) == [batch(1).batch_id]
    assert "batch spoilt of tenant default is missing in lists" in caplog.text


def test_other_objects_in_the_index_are_passed_over(local_store: LocalStore) -> None:
    batches = BatchStore(local_store)
    batches.create(batch(1))
    for key in ("00000/note", "82023/.DS_Store", "99999/1.b"):
        local_store.put(f"batches/default/~times/{key}", b"")
    assert every_page(batches, 50) == [batch(1).batch_id]


def test_a_listing_asks_for_no_more_than_its_limit(store: ObjectStore, cost: Cost) -> None:
    for number in range(7):
        store.put(f"a/{number}", b"")
    keys = [f"a/{number}" for number in range(7)]
    for limit in (1, 3, 6, 7, 8):
        found: list[str] = []
        assert cost(lambda: found.extend(i.key for i in store.list("a/", limit=limit)))[1] == min(limit, 7)  # noqa: B023
        assert found == keys[:limit]
    assert [info.key for info in store.list("a/", start_after="a/4", limit=9)] == keys[5:]
