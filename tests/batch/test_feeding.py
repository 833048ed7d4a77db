"""Feeding a batch and putting it together, against a real RabbitMQ, Redis and store."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from inferq.broker import Message, PublishRejected
from inferq.consumers.batches.assembly import end
from inferq.consumers.batches.feeder import Assemble, GoOn, Slice
from inferq.consumers.batches.services import Pauses
from inferq.storage import upload_key
from inferq.storage.batches.lines import SourceRefused
from inferq.storage.batches.sources import Cursor
from inferq.storage.batches.store import RecordMissing
from tests.batch.conftest import BatchSite, QuickWorker
from tests.batch.sources import lines, payloads


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
