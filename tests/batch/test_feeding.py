"""Feeding a batch and putting it together, against a real RabbitMQ, Redis and store."""

from __future__ import annotations

import gzip
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import JsonValue

from inferq.broker import Message, PublishRejected, connect
from inferq.consumers.batches.assembly import Unfinished, end
from inferq.consumers.batches.feeder import AGAIN, Assemble, GoOn, Nothing, Slice
from inferq.consumers.batches.lost_lines import LostLines, refeed_due
from inferq.consumers.batches.recount import Recount
from inferq.consumers.batches.services import BatchServices, Pauses
from inferq.schemas import BatchCounts, InvalidTask, Result, State, TaskStatus, parse_task
from inferq.storage import BatchConflict, Stall, upload_key
from inferq.storage.batches.lines import SourceRefused
from inferq.storage.batches.sources import Cursor
from inferq.storage.batches.store import RecordMissing
from tests.batch.conftest import BatchSite, QuickWorker
from tests.waiting import eventually


def lines(count: int) -> bytes:
    return b"".join(b'{"payload": %d}\n' % number for number in range(1, count + 1))


def payloads(output: list[dict[str, object]]) -> list[object]:
    return [entry["output"]["payload"] for entry in output]  # type: ignore[index]


def test_every_line_becomes_a_task_and_the_output_is_in_their_order(
    site: BatchSite, worker: QuickWorker
) -> None:
    batch = site.batch(lines(1200), max_in_flight=300)
    summary = site.finish(batch)
    assert (summary.state, summary.counts.total, summary.counts.succeeded) == ("completed", 1200, 1200)
    assert payloads(site.output(batch)) == list(range(1, 1201))
    assert site.errors(batch) == []
    assert set(site.ran.values()) == {1}
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert (standing.state, standing.counts.succeeded, standing.counts.queued) == ("completed", 1200, 0)


BAD = [
    b'\xef\xbb\xbf{"payload": 1}\r\n',  # 1: a byte order mark, CRLF
    b"\n",  # 2: blank
    b'{"payload": \n',  # 3: broken
    b"[1, 2]\r\n",  # 4: no object
    b'{"payload": 5, "colour": "red"}\n',  # 5: an unknown field
    b'{"delay": "soon"}\n',  # 6: a wrong type
    b'{"tenant": "other", "payload": 7}\n',  # 7: another tenant
    b'{"payload": "' + b"x" * 1_000_000 + b'"}\n',  # 8: 1 MB
    b'{"task_id": "mine", "payload": 9}\n',  # 9: an id of its own
    b'{"task_id": "mine", "payload": 10}\n',  # 10: the same again
    b'{"task_type": "nope"}\n',  # 11: an unknown type
    b'{"payload": 12, "task_id": "BATCH.1"}\n',  # 12: an id that line 1 has
    b'{"payload": NaN}\n',  # 13: no JSON number
    b"\xff\xfe\x00\n",  # 14: no UTF-8
    b'{"payload": "fail"}\n',  # 15: a task that fails
    b'   {"payload": 16}',  # 16: no final newline
]


def test_bad_lines_are_counted_and_named_and_stop_nothing(site: BatchSite, worker: QuickWorker) -> None:
    content = b"".join(BAD).replace(b"BATCH", b"bad")
    batch = site.batch(content, batch_id="bad")
    summary = site.finish(batch)
    assert summary.state == "completed"
    counts = summary.counts
    assert (counts.total, counts.succeeded, counts.failed, counts.invalid) == (15, 3, 1, 11)
    assert [(e["line"], e["task_id"]) for e in site.output(batch)] == [
        (1, "bad.1"),
        (9, "mine"),
        (16, "bad.16"),
    ]
    told = {entry["line"]: (entry["status"], entry["error"]["message"]) for entry in site.errors(batch)}
    assert list(told) == [3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]
    for line, words in {
        3: "not JSON", 4: "not a JSON object", 5: "colour: is unknown", 6: "delay", 7: "another tenant",
        8: "1000015 bytes", 10: "same task_id as line 9", 11: "not known",
        12: "reserved for lines without a task_id", 13: "not a JSON number", 14: "JSON", 15: "as you wish",
    }.items():  # fmt: skip
        assert words in told[line][1], told[line]
    assert summary.failures["wished"] == 1
    standing = site.services.index.look("default", "bad")
    assert standing is not None
    assert (standing.counts.invalid, standing.counts.failed, standing.counts.total) == (11, 1, 15)


def test_a_line_whose_id_cannot_be_one_is_invalid_and_the_rest_is_fed(
    site: BatchSite, worker: QuickWorker
) -> None:
    bad = [b"\\ud800", b"a b", b"x" * 129, b"", b"a b"]
    content = b"".join(b'{"task_id": "%b", "payload": 1}\n' % task_id for task_id in bad)
    batch = site.batch(content + b'{"task_id": "good-id", "payload": 6}\n{"payload": 7}\n')
    summary = site.finish(batch)
    assert (summary.state, summary.counts.succeeded, summary.counts.invalid) == ("completed", 2, 5)
    assert payloads(site.output(batch)) == [6, 7]


def test_a_gzipped_source_of_two_members_is_read_and_resumed(site: BatchSite, worker: QuickWorker) -> None:
    packed = gzip.compress(lines(700)) + gzip.compress(b'{"payload": 701}\n{"payload": 702}')
    batch = site.batch(packed)
    assert site.finish(batch).counts.succeeded == 702
    assert payloads(site.output(batch)) == list(range(1, 703))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n  \r\n\n", "empty"),
        (gzip.compress(lines(5000), mtime=0)[:-200], "truncated gzip"),
        (gzip.compress(b"", mtime=0), "empty"),
        (b"\x1f\x8b\x08 this is no gzip", "not an intact gzip"),
        (lines(2).decode().encode("utf-16"), "save it as UTF-8"),
        (b"\xfe\xff" + lines(2).decode().encode("utf-16-be"), "save it as UTF-8"),
        (gzip.compress(lines(2).decode().encode("utf-16"), mtime=0), "save it as UTF-8"),
    ],
)
def test_a_source_that_cannot_be_used_ends_the_batch_with_the_reason(
    site: BatchSite, content: bytes, words: str
) -> None:
    batch = site.batch(content)
    summary = site.finish(batch)
    assert summary.state == "failed"
    assert summary.error is not None
    assert words in summary.error
    assert site.output(batch) == site.errors(batch) == []


def test_a_record_that_is_missing_is_not_taken_for_the_end_of_its_batch(site: BatchSite) -> None:
    batch = site.batch(lines(3))
    site.services.store.delete(f"batches/default/{batch.batch_id}/batch.json")
    with pytest.raises(RecordMissing):
        site.slice(batch)


def test_a_source_that_is_missing_fails_the_batch_only_after_a_second_look(site: BatchSite) -> None:
    batch = site.batch_of("inferq:none.jsonl")
    first = Slice(site.services, "default", batch.batch_id, chain="c", part=0, cursor=Cursor(), doubtful=True)
    with pytest.raises(SourceRefused, match="there is no"):
        first.run()
    assert isinstance(site.slice(batch), Assemble)


def test_an_upload_that_does_not_exist_ends_the_batch(site: BatchSite) -> None:
    summary = site.finish(site.batch_of("inferq:nowhere.jsonl"))
    assert summary.state == "failed"
    assert "upload it first" in (summary.error or "")


@pytest.mark.parametrize("own_ids", [False, True])
def test_a_source_that_goes_after_it_was_fed_ends_the_batch_with_what_has_ended(
    site: BatchSite, worker: QuickWorker, own_ids: bool
) -> None:
    failing = b'{"task_id": "fails", "payload": "fail"}\n' if own_ids else b'{"payload": "fail"}\n'
    batch = site.batch(lines(20) + failing)
    site.feed(batch)
    site.services.store.delete(upload_key("default", batch.source.removeprefix("inferq:")))
    summary = end(site.services, batch)
    assert summary.state == "failed"
    assert "submit the batch again" in (summary.error or "")
    counts = summary.counts
    assert (counts.total, counts.succeeded, counts.failed) == (21, 20, 1)
    assert summary.failures == ({} if own_ids else {"wished": 1})


def test_a_source_that_goes_between_two_slices_leaves_the_counts_true(
    site: BatchSite, worker: QuickWorker
) -> None:
    site.change(settings={"batch_slice": 0.3})
    batch = site.batch(lines(900), max_in_flight=100)
    key = upload_key("default", batch.source.removeprefix("inferq:"))

    def go_away(_next: object) -> None:
        # A slow machine's first slice may be over before any task has ended.
        standing = site.services.index.look("default", batch.batch_id)
        if standing is not None and standing.counts.succeeded:
            site.services.store.delete(key)

    summary = site.finish(batch, between=go_away)
    assert (summary.state, summary.counts.total) == ("failed", 900)
    assert 0 < summary.counts.succeeded < 900


def test_defaults_give_way_to_the_line_and_metadata_are_merged(site: BatchSite, worker: QuickWorker) -> None:
    content = b'{"metadata": {"b": 2}}\n{"payload": "own", "metadata": {"a": 9}}\n{"\\u0070ayload": "esc"}\n'
    batch = site.batch(content, defaults={"payload": "default", "metadata": {"a": 1}})
    site.finish(batch)
    output = site.output(batch)
    assert payloads(output) == ["default", "own", "esc"]
    assert [entry["metadata"] for entry in output] == [{"a": 1, "b": 2}, {"a": 9}, {"a": 1}]


def test_no_more_than_max_in_flight_are_fed(site: BatchSite) -> None:
    batch = site.batch(lines(100), max_in_flight=7)
    match site.slice(batch):
        case GoOn(cursor, _):
            assert cursor.line == 7
        case other:
            raise AssertionError(other)
    assert site.depth() == 7


def test_what_is_on_its_way_as_a_slice_ends_goes_out_once(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = site.batch(lines(4000), max_in_flight=5000)
    sent: Counter[str | None] = Counter()
    publish_all = site.services.publisher.publish_all

    def count(messages: Sequence[Message]) -> Future[None]:
        sent.update(message.message_id for message in messages)
        if len(sent) in (1000, 2000):
            site.services.stopping.set()
        return publish_all(messages)

    monkeypatch.setattr(site.services.publisher, "publish_all", count)
    cursor = Cursor()
    for part in range(3):
        going_on = site.slice(batch, cursor, part=part)
        assert isinstance(going_on, GoOn)
        cursor = going_on.cursor
        assert cursor.line == (1000, 2000, 4000)[part]
        site.services.stopping.clear()
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert (standing.line, standing.offset) == (4000, len(lines(4000)))
    assert (len(sent), set(sent.values())) == (4000, {1})


class FullQueue:
    """Stands in for `publish_all`: counts the tasks sent, and refuses one of them.

    `refuses` gets how often that one was sent.
    """

    def __init__(
        self, publish_all: Callable[..., Future[None]], late: str, refuses: Callable[[int], bool]
    ) -> None:
        self.sent: Counter[str | None] = Counter()
        self._publish_all = publish_all
        self._late = late
        self._refuses = refuses

    def __call__(self, messages: Sequence[Message], *, timeout: float | None = None) -> Future[None]:
        self.sent.update(message.message_id for message in messages if message.type == "echo")
        late = [message for message in messages if message.message_id == self._late]
        if not late or not self._refuses(self.sent[self._late]):
            return self._publish_all(messages, timeout=timeout)
        self._publish_all([message for message in messages if message not in late]).result()
        refused: Future[None] = Future()
        refused.set_exception(PublishRejected("the queue is full", refused=late))
        return refused


def test_only_what_a_full_queue_refuses_is_sent_on_and_on(
    site: BatchSite, worker: QuickWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.change(pauses=Pauses(rejected=0.05))
    batch = site.batch(lines(10))
    late = batch.task_id(4)
    queue = FullQueue(site.services.publisher.publish_all, late, refuses=lambda sent: sent <= 3)
    monkeypatch.setattr(site.services.publisher, "publish_all", queue)
    assert site.finish(batch).counts.succeeded == 10
    assert queue.sent.pop(late) == 4
    assert set(queue.sent.values()) == {1}


def test_a_slice_that_ends_at_a_full_queue_leaves_only_the_refused_to_the_next(
    site: BatchSite, worker: QuickWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.change(pauses=Pauses(rejected=0.05))
    batch = site.batch(lines(10))
    late = batch.task_id(4)

    def refuses(sent: int) -> bool:
        if sent == 1:
            site.services.stopping.set()
        return sent == 1

    queue = FullQueue(site.services.publisher.publish_all, late, refuses)
    monkeypatch.setattr(site.services.publisher, "publish_all", queue)
    cursor = Cursor()
    with pytest.raises(PublishRejected):
        site.slice(batch, cursor)
    site.services.stopping.clear()
    assert site.finish(batch).counts.succeeded == 10
    assert queue.sent.pop(late) == 2
    assert set(queue.sent.values()) == {1}


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
    read, lines_of = [], site.services.sources.lines
    monkeypatch.setattr(site.services.sources, "lines", lambda *of: read.append(of) or lines_of(*of))
    recount = Recount(site.services, batch, source, lambda: None)
    recount.in_flight()
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert (standing.counts.failed, standing.counts.queued, len(read)) == (2, 498, 1)
    recount.cancel_in_flight()
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert (standing.counts.failed, standing.counts.cancelled, len(read)) == (2, 498, 2)


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


def test_outside_its_window_nothing_is_fed(site: BatchSite) -> None:
    window = {"start": "00:00", "end": "00:01", "time_zone": "Etc/GMT-14"}
    batch = site.batch(lines(5), window=window)
    match site.slice(batch):
        case GoOn(cursor, seconds):
            assert cursor.line == 0
            assert 1 <= seconds <= 30
        case other:
            raise AssertionError(other)
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert standing.state == "paused"
    assert standing.counts.queued == 0


def test_what_has_ended_in_a_closed_window_is_put_together_without_waiting_for_it_to_open(
    site: BatchSite,
) -> None:
    moments = [datetime(2026, 11, 24, 23, 0, tzinfo=UTC)]
    site.change(settings={"batch_slice": 0.3}, clock=lambda: moments[-1])
    batch = site.batch(lines(20), window={"start": "22:00", "end": "06:00", "time_zone": "UTC"})
    fed = site.slice(batch)
    assert isinstance(fed, GoOn)
    moments.append(datetime(2026, 11, 25, 21, 0, tzinfo=UTC))
    site.services.index.ends("default", batch.batch_id, "succeeded", range(1, 21))
    assert site.slice(batch, fed.cursor, part=1) == Assemble()


def test_the_object_store_is_asked_more_and_more_seldom_for_ends_that_do_not_come(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes a second further each time that it is looked at."""
    seconds = itertools.count()
    asked: list[int] = []
    monkeypatch.setattr(Recount, "in_flight", lambda _: asked.append(next(seconds)))
    began = datetime(2026, 11, 24, tzinfo=UTC)
    site.change(
        settings={"batch_slice": 0.3, "batch_doubt": 3},
        clock=lambda: began + timedelta(seconds=next(seconds)),
    )
    batch = site.batch(lines(5))
    cursor, part = Cursor(), 0
    while len(asked) < 4:
        match site.slice(batch, cursor, part=part):
            case GoOn(cursor, _):
                part += 1
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert part > len(asked)  # no slice lasts until then
    assert all(later > 1.5 * earlier for earlier, later in pairwise(pauses))


def test_the_same_batch_is_one_batch_and_another_is_refused(site: BatchSite) -> None:
    batch = site.batch(lines(1), batch_id="twice")
    again = batch.model_copy(update={"created_at": batch.created_at.replace(year=2030)})
    assert site.services.batches.create(again) == batch
    with pytest.raises(BatchConflict, match="another content"):
        site.services.batches.create(again.model_copy(update={"priority": "high"}))


def test_a_batch_that_an_older_version_accepted_is_listed_once_it_is_fed(
    site: BatchSite, worker: QuickWorker
) -> None:
    site.batch(lines(1), batch_id="first")
    batches = site.services.batches
    batch = site.batch(lines(1), batch_id="older")
    for info in site.services.store.list("batches/default/~times/"):
        site.services.store.delete(info.key)
    assert batches.newest("default", limit=9) == []
    site.finish(batch)
    assert [entry.batch_id for entry in batches.newest("default", limit=9)] == ["older"]


@pytest.mark.parametrize("step", ["a later slice", "assembly"])
def test_a_batch_that_an_older_version_began_is_listed_by_each_later_step(site: BatchSite, step: str) -> None:
    site.batch(b"", batch_id="first")
    batches = site.services.batches
    batch = site.batch(b"", batch_id="older")
    for info in site.services.store.list("batches/default/~times/"):
        site.services.store.delete(info.key)
    assert batches.newest("default", limit=9) == []
    if step == "assembly":
        end(site.services, batch)
    else:
        site.slice(batch, part=1)
    assert [entry.batch_id for entry in batches.newest("default", limit=9)] == ["older"]


def test_a_batch_of_a_later_version_is_fed_by_what_this_one_knows(
    site: BatchSite, worker: QuickWorker
) -> None:
    batch = site.batch(lines(3), window={"start": "00:00", "end": "00:00"})
    key = f"batches/default/{batch.batch_id}/batch.json"
    record = json.loads(site.services.store.get(key)) | {"retention": "30d"}
    record["window"]["days"] = "mon-fri"
    site.services.store.put(key, json.dumps(record).encode())
    assert site.services.batches.create(batch) == site.services.batches.load("default", batch.batch_id)
    assert site.finish(batch).counts.succeeded == 3


@pytest.mark.parametrize(("task_id", "segment"), [("..", "%2E%2E"), ("scan:1", "scan:1")])
def test_an_artifacts_url_in_the_output_is_safe_for_any_id(
    site: BatchSite, tmp_path: Path, task_id: str, segment: str
) -> None:
    batch = site.batch(json.dumps({"task_id": task_id, "payload": 1}).encode())
    services = site.services
    services.sources.settle(batch)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    artifact = services.results.save_artifact("default", task_id, "a/b c.txt", file, "text/plain", run="1-a")
    done = Result(
        task_id=task_id, task_type="echo", tenant="default", attempts=1, finished_at=datetime.now(UTC),
        batch_id=batch.batch_id, batch_line=1, digest="d", status="succeeded", artifacts=(artifact,),
    )  # fmt: skip
    services.results.save(done)
    end(services, batch)
    ((told,),) = (line["artifacts"] for line in site.output(batch))
    address = services.storage.api_url.rstrip("/")
    assert told["url"] == f"{address}/v1/tasks/{segment}/artifacts/a%2Fb%20c.txt"


def test_assembling_twice_gives_the_same_files_and_one_summary(site: BatchSite, worker: QuickWorker) -> None:
    batch = site.batch(lines(30) + b"x\n")
    first = site.finish(batch)
    before = site.output(batch), site.errors(batch)
    assert site.slice(batch) == Nothing()
    assert site.services.batches.summary("default", batch.batch_id) == first
    assert (site.output(batch), site.errors(batch)) == before


def test_as_many_outputs_are_fetched_at_a_time_as_there_are_readers(
    site: BatchSite, worker: QuickWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = site.services.settings.batch_readers
    together = threading.Barrier(readers)

    def output(result: Result) -> JsonValue:
        together.wait(60)
        return {"pages": [{}] * (result.batch_line or 0)}

    monkeypatch.setattr(site.services.results, "output", output)
    batch = site.batch(lines(2 * readers))
    assert site.finish(batch).pages == sum(range(1, 2 * readers + 1))
    assert payloads(site.output(batch)) == list(range(1, 2 * readers + 1))


def test_redis_keeps_nothing_of_a_line_that_has_ended(site: BatchSite, worker: QuickWorker) -> None:
    batch = site.batch(lines(300))
    site.finish(batch)
    left = sorted(key.decode() for key in site.redis.keys("*"))
    assert [key for key in left if not key.startswith(("inferq:batch:", "inferq:bits:"))] == []
    assert json.dumps(left).count(batch.batch_id) == len(left)


def test_a_line_that_is_assembled_too_early_is_not_left_out(site: BatchSite) -> None:
    from inferq.consumers.batches.assembly import Assembly, Unfinished

    batch = site.batch(lines(3))
    assert isinstance(site.slice(batch), GoOn | Assemble)
    with pytest.raises(Unfinished):
        Assembly(site.services, batch).run()
