"""A batch goes on after lost queues, flushed records, deleted results and second feeders, and can be cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferq.broker import connect
from inferq.consumers.batches.assembly import Unfinished, end
from inferq.consumers.batches.feeder import AGAIN, GoOn, Nothing, Slice
from inferq.consumers.batches.lost_lines import LostLines, refeed_due
from inferq.consumers.batches.recount import Recount
from inferq.consumers.batches.services import BatchServices, Pauses
from inferq.schemas import BatchCounts, InvalidTask, Result, State, TaskStatus, parse_task
from inferq.storage import Stall
from inferq.storage.batches.sources import Cursor
from tests.batch.conftest import BatchSite, QuickWorker
from tests.batch.sources import lines, payloads
from tests.waiting import eventually


def test_an_abandoned_slice_is_begun_again_and_nothing_runs_twice(
    site: BatchSite, worker: QuickWorker
) -> None:
    site.change(settings={"batch_slice": 0.3})
    batch = site.batch(lines(900), max_in_flight=100)
    assert isinstance(site.slice(batch), GoOn)
    # The message of the first slice comes again, from the start: its last cursor was never sent on.
    site.redis.hset(f"inferq:batch:default:{batch.batch_id}", "slice", 0)
    summary = site.finish(batch)
    assert summary.counts.succeeded == 900
    assert set(site.ran.values()) == {1}
    assert len(site.ran) == 900


def test_redis_flushed_between_slices_loses_nothing(site: BatchSite, worker: QuickWorker) -> None:
    site.change(settings={"batch_slice": 0.3})
    batch = site.batch(lines(1000) + b"broken\n" + b'{"payload": "fail"}\n', max_in_flight=40)
    flushed = []

    def flush(cursor: Cursor) -> None:
        if len(flushed) < 2 and cursor.line > 100:
            site.redis.flushdb()
            flushed.append(cursor.line)

    summary = site.finish(batch, between=flush)
    assert len(flushed) == 2
    counts = summary.counts
    assert (counts.total, counts.succeeded, counts.failed, counts.invalid) == (1002, 1000, 1, 1)
    assert set(site.ran.values()) == {1}
    assert payloads(site.output(batch)) == list(range(1, 1001))


def test_ends_that_redis_never_heard_of_are_found_in_the_store(site: BatchSite, worker: QuickWorker) -> None:
    worker.tells_redis = False
    batch = site.batch(lines(120) + b'{"task_id": "mine"}\n', max_in_flight=50)
    assert site.finish(batch).counts.succeeded == 121


def test_the_lines_of_a_purged_queue_are_fed_again(site: BatchSite) -> None:
    site.change(settings={"batch_slice": 0.3})
    batch = site.batch(lines(5) + b'{"task_id": "mine"}\n')
    site.slice(batch)
    eventually(lambda: site.depth() == 6)
    connection = connect(site.services.broker, name="test")
    connection.channel().queue_purge("inference.echo.normal")
    connection.close()
    worker = QuickWorker(site)
    worker.start()
    try:
        assert site.finish(batch).counts.succeeded == 6
        assert set(site.ran.values()) == {1}
    finally:
        worker.stop()


def test_a_result_that_is_deleted_before_assembly_is_made_again(site: BatchSite, worker: QuickWorker) -> None:
    batch = site.batch(lines(3))
    site.feed(batch)
    lost = batch.task_id(2)
    site.services.store.delete(f"tasks/default/{lost}/result.json")
    with pytest.raises(Unfinished):
        end(site.services, batch)
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    site.services.index.forget("default", batch.batch_id, high_water=standing.line)
    cursor, part = Cursor(standing.line, standing.offset), 0
    while isinstance(found := site.slice(batch, cursor, chain="again-1", part=part), GoOn):
        cursor, part = found.cursor, part + 1
        assert part < 100
    assert end(site.services, batch).counts.succeeded == 3
    assert site.ran == {batch.task_id(1): 1, lost: 2, batch.task_id(3): 1}


@pytest.mark.parametrize(
    ("waiting", "state", "lasted", "lost"),
    [
        (0, None, 20, True),
        (0, "queued", 20, True),
        (3, None, 599, False),  # the messages may be these tasks'
        (3, None, 600, True),
        (None, None, 6000, False),  # without its queue the message would be unroutable
        (0, "running", 7199, False),
        (0, "retrying", 7199, False),
        (0, "running", 7200, True),
    ],
)
def test_a_line_is_lost_if_neither_a_queue_nor_a_worker_seems_to_have_it(
    waiting: int | None, state: State | None, lasted: float, lost: bool
) -> None:
    task = parse_task({"task_id": "b.1", "task_type": "echo", "payload": 1})
    known = (
        None if state is None else TaskStatus(task_id="b.1", task_type="echo", tenant="default", state=state)
    )
    status = SimpleNamespace(get=lambda _tenant, _task_id: known)
    services = cast(BatchServices, SimpleNamespace(status=status))
    lines = LostLines(services, lasted, lambda queue: waiting if "echo.normal" in queue else None)
    assert lines.is_lost(task) == lost


def test_lost_lines_are_looked_for_more_and_more_seldom() -> None:
    due = [
        refeed_due(Stall(0, 100.0, asked, again), 200.0)
        for asked, again in ((0, 0), (50, 0), (50, 49), (50, 50))
    ]
    assert due == [False, True, True, False]


def test_all_that_is_in_flight_is_looked_up_and_the_source_is_read_once_for_it(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"".join(b'{"task_id": "own-%d", "payload": %d}\n' % (n, n) for n in range(1, 501))
    batch = site.batch(content)
    site.slice(batch)
    source = site.services.batches.source("default", batch.batch_id)
    assert source is not None
    for number in (450, 451):
        task = parse_task(
            {"task_id": f"own-{number}", "task_type": "echo", "payload": number,
             "batch_id": batch.batch_id, "batch_line": number}
        )  # fmt: skip
        site.services.results.save(
            Result.failure(task, InvalidTask("no"), attempts=1, finished_at=datetime.now(UTC))
        )
    repeated = parse_task(
        {
            "task_id": "own-452",
            "task_type": "echo",
            "payload": 452,
            "batch_id": batch.batch_id,
            "batch_line": 452,
        }
    )
    site.services.results.save(
        Result(
            task_id="own-452", task_type="echo", tenant="default", status="succeeded", attempts=1, cached=True,
            batch_id=batch.batch_id, batch_line=452, finished_at=datetime.now(UTC), digest=repeated.digest(),
        )
    )  # fmt: skip
    read, lines_of = [], site.services.sources.lines
    monkeypatch.setattr(site.services.sources, "lines", lambda *of: read.append(of) or lines_of(*of))
    recount = Recount(site.services, batch, source, lambda: None)
    recount.in_flight()
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert (standing.counts.failed, standing.counts.queued, len(read)) == (2, 497, 1)
    assert (standing.counts.succeeded, standing.counts.cached) == (1, 1)
    recount.cancel_in_flight()
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert (standing.counts.failed, standing.counts.cancelled, len(read)) == (2, 497, 2)


def test_an_id_that_another_task_has_ends_as_a_conflict(site: BatchSite, worker: QuickWorker) -> None:
    first = site.batch(b'{"task_id": "shared", "payload": 1}\n')
    site.finish(first)
    second = site.batch(b'{"task_id": "shared", "payload": 2}\n{"payload": 3}\n')
    worker.tells_redis = False  # a worker buries it, and tells nobody of its end
    summary = site.finish(second)
    assert (summary.counts.succeeded, summary.counts.failed) == (1, 1)
    assert summary.failures == {"id_conflict": 1}


def test_a_result_that_nobody_can_read_is_a_failed_line(site: BatchSite, worker: QuickWorker) -> None:
    batch = site.batch(lines(3), batch_id="spoilt")
    site.services.store.put("tasks/default/spoilt.2/result.json", b"spoilt")
    worker.spares = {"spoilt.2"}  # as a worker does, which buries it
    summary = site.finish(batch)
    assert (summary.counts.succeeded, summary.failures) == (2, {"result_unreadable": 1})
    (error,) = site.errors(batch)
    assert (error["line"], error["error"]["code"]) == (2, "result_unreadable")


def test_a_cancelled_batch_ends_without_any_worker(site: BatchSite) -> None:
    batch = site.batch(lines(50) + b"broken\n", max_in_flight=20)
    site.slice(batch)
    site.services.batches.request_cancel("default", batch.batch_id)
    site.redis.flushdb()  # the wish stands in the store, too
    summary = site.finish(batch)
    assert summary.state == "cancelled"
    assert (summary.counts.cancelled, summary.counts.invalid, summary.counts.total) == (50, 1, 51)
    assert site.output(batch) == []
    # What waits in the queue finds its end on record.
    worker = QuickWorker(site)
    worker.start()
    while site.depth():
        pass
    worker.stop()
    assert site.ran == {}


def test_a_batch_that_is_cancelled_while_its_source_is_read_reads_no_further(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.change(pauses=Pauses(cancel_look=0))
    batch = site.batch(b"to come")
    read: list[int] = []

    def pieces(_key: str, **_: Any) -> Iterator[bytes]:
        for number in range(1000):
            if number == 5:
                site.services.batches.request_cancel("default", batch.batch_id)
            read.append(number)
            yield b'{"payload": 1}\n'

    monkeypatch.setattr(site.services.store, "stream", pieces)
    summary = site.finish(batch)
    assert max(read) < 10
    assert (summary.state, summary.error, summary.counts) == ("cancelled", None, BatchCounts(total=0))
    assert site.depth() == 0


def test_a_batch_that_redis_is_told_to_cancel_stops_being_fed(site: BatchSite, worker: QuickWorker) -> None:
    site.change(settings={"batch_slice": 0.3})
    batch = site.batch(lines(3000), max_in_flight=10)

    def cancel(cursor: Cursor) -> None:
        site.services.batches.request_cancel("default", batch.batch_id)

    summary = site.finish(batch, between=cancel)
    assert summary.state == "cancelled"
    assert summary.counts.succeeded == len(site.ran) < 3000
    assert summary.counts.succeeded + summary.counts.cancelled == 3000


def test_a_second_feeding_of_a_batch_gives_way_to_the_first(site: BatchSite) -> None:
    batch = site.batch(lines(5))
    take = site.services.index.take
    name = ("default", batch.batch_id)
    assert take(*name, chain="a", part=0, token="a0") == "taken"
    assert take(*name, chain="b", part=0, token="b0") == "another"
    assert take(*name, chain="a", part=0, token="a1") == "held"
    site.services.index.release(*name, "a0")
    assert take(*name, chain="a", part=1, token="a2") == "taken"
    assert take(*name, chain="a", part=0, token="a3") == "outdated"
    assert site.slice(batch, chain="b") == Nothing()


def test_a_feeding_that_has_to_come_about_waits_for_the_lease(site: BatchSite) -> None:
    batch = site.batch(lines(3))
    assert site.services.index.take("default", batch.batch_id, chain="over", part=0, token="dead") == "taken"
    assert site.slice(batch, chain="c") == Nothing()
    assert isinstance(site.slice(batch, chain=f"{AGAIN}1"), GoOn)


def test_a_feeder_says_that_it_lives_while_it_settles_the_source(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.services.index  # noqa: B018 - its lease is as ever
    object.__setattr__(site.services.settings, "batch_lease", 0)  # due at once
    batch = site.batch(lines(5))
    renewed: list[bool] = []

    def renew(feeding: Slice) -> None:
        renewed.append(site.services.batches.source("default", batch.batch_id) is None)

    monkeypatch.setattr(Slice, "_renew", renew)
    site.slice(batch)
    assert renewed[:1] == [True]
