"""The bitmaps of batches, in a real Redis, and what the status index does with the lines of one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.schemas import EndState, ErrorInfo, Result, Task, parse_task
from inferq.storage import BatchIndex, IndexLost, LeaseLost, StatusIndex, StorageSettings
from inferq.storage.status.keys import batch_key
from tests.runs import begin_run
from tests.waiting import eventually

NOW = datetime(2026, 3, 1, tzinfo=UTC)
B = ("default", "b:1")


@pytest.fixture
def address(redis_url: str) -> Iterator[str]:
    address = urlsplit(redis_url)._replace(path="/6").geturl()
    yield address
    with redis.Redis.from_url(address) as connection:
        connection.flushdb()


@pytest.fixture
def status(address: str) -> Iterator[StatusIndex]:
    status = StatusIndex.from_settings(StorageSettings(redis_url=address))
    yield status
    status.close()


@pytest.fixture
def index(status: StatusIndex) -> BatchIndex:
    """With lines 1 to 3 fed, and up to 10 to come."""
    index = BatchIndex(status)
    index.take(*B, chain="c", part=0, token="t")
    index.open(*B, token="t", line=0, offset=0, total=10, cancelled=False)
    index.step(*B, token="t", high_water=10, line=4, offset=99, fed=[1, 2, 3], invalid=[4])
    return index


def line(number: int) -> Task:
    return parse_task(
        {"task_id": f"b:1.{number}", "task_type": "echo", "batch_id": "b:1", "batch_line": number}
    )


def begin(status: StatusIndex, number: int, redrives: int = 0) -> bool:
    return begin_run(status, line(number), redrives=redrives, started_at=NOW).cancel_requested


def end(
    status: StatusIndex, number: int, state: EndState, redrives: int = 0, *, cached: bool = False
) -> None:
    task = line(number)
    error = None if state == "succeeded" else ErrorInfo(code="x", message="x", retryable=False)
    status.ended(
        Result(
            task_id=task.task_id, task_type="echo", tenant="default", status=state, attempts=1, error=error,
            batch_id="b:1", batch_line=number, finished_at=NOW, digest=task.digest(), redrives=redrives,
            cached=cached,
        )
    )  # fmt: skip


def counts(index: BatchIndex) -> tuple[int, ...]:
    standing = index.look(*B)
    assert standing is not None
    c = standing.counts
    return (c.queued, c.running, c.succeeded, c.failed, c.cancelled, c.invalid)


def test_the_rate_is_measured_again_after_a_clock_that_was_ahead(
    status: StatusIndex, index: BatchIndex
) -> None:
    ahead = f"{int((datetime.now(UTC).timestamp() + 30 * 86400) * 1e6)} 0"
    key = batch_key(*B)
    status.write(lambda client: client.hset(key, "then", ahead))
    index.look(*B)
    assert status.write(lambda client: client.hmget(key, "then", "before"))[0] != ahead


def test_the_lines_to_feed_are_those_after_the_processed_ones(status: StatusIndex, index: BatchIndex) -> None:
    assert index.unfed([B, ("default", "another"), B]) == [6, None, 6]
    assert index.unfed([]) == []


def test_lines_are_counted_where_they_are(status: StatusIndex, index: BatchIndex) -> None:
    assert counts(index) == (3, 0, 0, 0, 0, 1)
    begin(status, 1)
    assert counts(index) == (3, 1, 0, 0, 0, 1)
    end(status, 1, "succeeded")
    end(status, 2, "failed")
    end(status, 3, "cancelled")
    assert counts(index) == (0, 0, 1, 1, 1, 1)
    assert index.unended(*B) == []


def test_an_end_told_twice_counts_once_and_a_success_stands(status: StatusIndex, index: BatchIndex) -> None:
    for _ in range(2):
        end(status, 1, "failed")
    assert counts(index) == (2, 0, 0, 1, 0, 1)
    begin(status, 1, redrives=1)
    end(status, 1, "succeeded", redrives=1)
    assert counts(index) == (2, 0, 1, 0, 0, 1)
    end(status, 1, "failed")
    end(status, 1, "cancelled")
    assert counts(index) == (2, 0, 1, 0, 0, 1)


def test_lines_that_the_result_cache_answered_are_counted_once_until_they_are_counted_again(
    status: StatusIndex, index: BatchIndex
) -> None:
    end(status, 1, "succeeded")
    for _ in range(2):
        end(status, 2, "succeeded", cached=True)
    end(status, 1 << 31, "succeeded", cached=True)
    standing = index.look(*B)
    assert standing is not None
    assert (standing.counts.succeeded, standing.counts.cached) == (2, 1)
    index.forget(*B, high_water=6)
    index.mark(*B, "fed", range(1, 4))
    index.open(*B, token="t", line=6, offset=150, total=6, cancelled=False)
    index.ends(*B, "succeeded", [1])
    standing = index.look(*B)
    assert standing is not None
    assert (standing.counts.succeeded, standing.counts.cached) == (1, 0)


def test_a_line_that_ends_before_it_is_marked_as_fed_counts(status: StatusIndex, index: BatchIndex) -> None:
    end(status, 7, "succeeded")
    assert counts(index) == (3, 0, 1, 0, 0, 1)
    index.step(*B, token="t", line=7, offset=150, fed=[7])
    assert counts(index) == (3, 0, 1, 0, 0, 1)
    assert index.unended(*B) == [1, 2, 3]
    assert index.unended(*B, after=1) == [2, 3]


def test_a_made_up_line_takes_no_memory(status: StatusIndex, index: BatchIndex, address: str) -> None:
    end(status, 1 << 31, "succeeded")
    assert counts(index) == (3, 0, 0, 0, 0, 1)
    with redis.Redis.from_url(address) as connection:
        assert max(connection.memory_usage(key) or 0 for key in connection.keys("*")) < 10_000


def test_what_has_ended_leaves_no_record(status: StatusIndex, index: BatchIndex, address: str) -> None:
    begin(status, 1)
    assert status.get("default", "b:1.1") is not None
    end(status, 1, "failed")
    assert status.get("default", "b:1.1") is None
    assert status.list("default").items == ()
    with redis.Redis.from_url(address) as connection:
        assert not [key for key in connection.keys("*") if b":t:" in key or b":l:" in key or b":s:" in key]


def test_a_cancelled_batch_lets_nothing_begin_and_stops_what_runs(
    status: StatusIndex, index: BatchIndex
) -> None:
    assert not begin(status, 1)
    assert not status.cancel_requested("default", "b:1.1", "b:1")
    index.request_cancel(*B, line=2)
    assert begin(status, 2)
    assert status.cancel_requested("default", "b:1.2", "b:1", 2)
    assert not status.cancel_requested("default", "b:1.1", "b:1", 1)
    assert not begin(status, 3)
    index.request_cancel(*B)
    assert begin(status, 3)
    assert status.cancel_requested("default", "b:1.1", "b:1")
    assert index.step(*B, token="t").cancel_requested


def test_another_feeder_and_a_lost_index_are_told(index: BatchIndex, address: str) -> None:
    with pytest.raises(LeaseLost):
        index.step(*B, token="other", fed=[5])
    assert index.processed(*B, 1, 10) == {1, 2, 3, 4}
    with redis.Redis.from_url(address) as connection:
        connection.flushdb()
    with pytest.raises(IndexLost):
        index.step(*B, token="t", fed=[5])
    assert index.look(*B) is None


def test_whoever_makes_the_index_anew_keeps_the_batch(status: StatusIndex) -> None:
    index = BatchIndex(status, lease_seconds=1)
    assert index.take(*B, chain="c", part=0, token="t") == "taken"
    index.forget(*B, high_water=5, token="t")
    for _ in range(3):
        time.sleep(0.5)
        with pytest.raises(IndexLost):
            index.step(*B, token="t")
    assert index.take(*B, chain="d", part=0, token="d0") == "another"
    with pytest.raises(LeaseLost):
        index.forget(*B, high_water=0, token="d0")
    with pytest.raises(LeaseLost):
        index.open(*B, token="d0", line=0, offset=0, total=10, cancelled=False)
    assert index.look(*B).high_water == 5  # type: ignore[union-attr]


def test_a_look_tells_whether_a_feeder_has_the_batch(status: StatusIndex) -> None:
    index = BatchIndex(status)

    def leased() -> bool | None:
        standing = index.look(*B)
        return standing and standing.leased

    index.set_state(*B, "preparing")
    assert leased() is False
    index.take(*B, chain="c", part=0, token="t")
    assert leased() is True
    index.open(*B, token="t", line=0, offset=0, total=10, cancelled=False)
    assert leased() is True
    index.step(*B, token="t", high_water=10, line=2, offset=99, fed=[1, 2])
    assert (leased(), counts(index)) == (True, (2, 0, 0, 0, 0, 0))
    index.release(*B, "other")
    assert leased() is True
    index.release(*B, "t")
    assert (leased(), counts(index)) == (False, (2, 0, 0, 0, 0, 0))
    BatchIndex(status, lease_seconds=1).take(*B, chain="c", part=1, token="t1")
    assert leased() is True
    eventually(lambda: leased() is False)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sets(st.integers(1, 70), max_size=70), min_size=1, max_size=4),
    invalid=st.sets(st.integers(71, 99)),
)
def test_any_lines_are_marked_and_no_others(
    index: BatchIndex, steps: list[set[int]], invalid: set[int]
) -> None:
    """Runs of lines are set byte by byte, and must leave their neighbours alone."""
    index.forget(*B, high_water=0)
    index.open(*B, token="t", line=0, offset=0, total=99, cancelled=False)
    fed: set[int] = set()
    for lines in steps:
        fed |= lines
        step = index.step(*B, token="t", line=99, fed=sorted(lines), invalid=sorted(invalid))
        assert (step.fed, step.invalid) == (len(fed), len(invalid))
        assert index.processed(*B, 1, 99) == fed | invalid
        assert index.unended(*B) == sorted(fed)
