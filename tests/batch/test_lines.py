"""Lines and the tasks in them: the pure core of batches."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from inferq.schemas import MAX_BODY_BYTES, Batch, InvalidTask, Window
from inferq.storage.batches.lines import Line, LineParser, read_lines, unpacked
from inferq.storage.batches.sources import _File

SOME_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def batch(**more: Any) -> Batch:
    said = {"batch_id": "b", "source": "inferq:x", "task_type": "echo", **more}
    return Batch(created_at=datetime(2026, 1, 1, tzinfo=UTC), **said)


def cut(content: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(content)) for place in places})
    return [content[a:b] for a, b in zip([0, *ends], [*ends, len(content)], strict=True)]


@given(
    st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=12),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=6),
)
def test_lines_are_the_same_however_they_come_and_wherever_one_begins(
    lines: list[bytes], end: bytes, final: bool, places: list[int]
) -> None:
    content = end.join(lines) + (end if final else b"")
    found = list(read_lines(cut(content, places)))
    assert found == list(read_lines([content]))
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    for line in found:
        rest = list(read_lines([content[line.end :]], line=line.number, offset=line.end))
        assert rest == found[line.number :]


@given(
    st.integers(MAX_BODY_BYTES - 4, MAX_BODY_BYTES + 8),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.sampled_from([b"", b"\n", b"\r\n"]),
    st.lists(st.integers(0, MAX_BODY_BYTES + 9), max_size=4),
)
def test_a_padded_line_is_too_long_or_not_wherever_the_pieces_are_cut(
    length: int, mark: bytes, end: bytes, places: list[int]
) -> None:
    content = mark + b"{}".rjust(length) + end
    (line,) = read_lines(cut(content, places))
    assert line.content == (b"{}" if length <= MAX_BODY_BYTES else None)


def test_a_byte_order_mark_is_passed_over_at_the_beginning_only() -> None:
    first, second = read_lines([b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}"])
    assert (first.content, second.content) == (b"{}", b"\xef\xbb\xbf{}")


@given(st.lists(st.integers(1, MAX_BODY_BYTES), max_size=30))
def test_a_line_of_any_length_is_held_in_constant_memory(pieces: list[int]) -> None:
    total = 10 * MAX_BODY_BYTES
    found = list(read_lines([b"x" * total, *(b"x" * size for size in pieces), b"\n", b"{}"]))
    assert found[0] == Line(1, total + sum(pieces) + 1, None, total + sum(pieces))
    assert found[1].content == b"{}"


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=4), st.lists(st.integers(0, 3000), max_size=4))
def test_gzip_of_any_members_unpacks(members: list[bytes], places: list[int]) -> None:
    packed = b"".join(map(gzip.compress, members))
    assert b"".join(unpacked(cut(packed, places))) == b"".join(members)


@given(st.lists(st.binary(max_size=9), max_size=9), st.lists(st.integers(-1, 20), max_size=9))
def test_pieces_are_read_as_a_file_is(pieces: list[bytes], counts: list[int]) -> None:
    file, ours = io.BytesIO(b"".join(pieces)), _File(iter(pieces))
    assert [ours.read(count) for count in counts] == [file.read(count) for count in counts]


def test_many_small_pieces_are_put_together_once() -> None:
    pieces = itertools.repeat(b"x" * 100, 100_000)
    began = time.process_time()
    assert len(_File(pieces).read(10_000_000)) == 10_000_000
    assert time.process_time() - began < 5  # it was minutes, each piece a copy of all before it


@settings(max_examples=30)
@given(SOME_JSON)
def test_the_task_of_a_line_is_that_of_its_object_with_the_batch_around_it(payload: Any) -> None:
    content = json.dumps({"payload": payload}).encode()
    task = LineParser(batch(defaults={"delay": 0.5})).parse(Line(7, 0, content, len(content)))
    body = json.loads(task.body())
    assert body.pop("payload", None) == payload
    assert body == {
        "task_id": "b.7", "task_type": "echo", "batch_id": "b", "batch_line": 7, "delay": 0.5,
    }  # fmt: skip


@given(st.text(alphabet='{}[]",:ab1 \\', max_size=30))
def test_nothing_that_is_no_json_object_becomes_a_task(text: str) -> None:
    content = text.strip().encode()
    try:
        whole = isinstance(json.loads(content), dict)
    except ValueError:
        whole = False
    if not whole:
        with pytest.raises(InvalidTask):
            LineParser(batch()).parse(Line(1, 0, content, len(content)))


def refusal(content: bytes) -> InvalidTask:
    """Why the content is no task, as line 7 of a batch with defaults."""
    with pytest.raises(InvalidTask) as refused:
        LineParser(batch(defaults={"delay": 0.5})).parse(Line(7, 0, content, len(content)))
    assert refused.value.code == "not_json"
    return refused.value


@pytest.mark.parametrize("content", [b'{"payload": }', b'{"payload": "\\u00e4"', b"{'payload': 1}", b"{1}"])
def test_a_fault_is_named_by_its_place_in_the_line(content: bytes) -> None:
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(content)
    message = refusal(content).message
    assert message.endswith(f"column {error.value.colno}")
    assert "line 1" not in message


@pytest.mark.parametrize("content", [b'{"payload": "\\ud800"}', b'{"payload": ' + b"9" * 5000 + b"}"])
def test_no_place_is_named_that_is_not_of_the_line(content: bytes) -> None:
    assert "column" not in refusal(content).message


def test_a_line_in_utf16_is_not_json() -> None:
    assert "the line is not JSON" in refusal('{"payload": 1}'.encode("utf-16-le")).message


@pytest.mark.parametrize("name", ["tenant", "batch_id", "batch_line"])
@pytest.mark.parametrize("escaped", [False, True])
def test_a_line_cannot_say_what_the_batch_says(name: str, escaped: bool) -> None:
    key = f"\\u{ord(name[0]):04x}{name[1:]}" if escaped else name
    content = f'{{"{key}": {"9" if name == "batch_line" else json.dumps("other")}}}'.encode()
    with pytest.raises(InvalidTask, match=name):
        LineParser(batch()).parse(Line(3, 0, content, len(content)))


@pytest.mark.parametrize(
    ("zone", "now", "seconds"),
    [
        ("UTC", "2026-03-01T21:00:00+00:00", 3600),
        ("UTC", "2026-03-01T22:00:00+00:00", 0),
        ("UTC", "2026-03-01T05:59:59+00:00", 0),
        ("UTC", "2026-03-01T06:00:00+00:00", 16 * 3600),
        ("Europe/Berlin", "2026-07-01T20:00:00+00:00", 0),
        ("Europe/Berlin", "2026-01-01T20:00:00+00:00", 3600),
        # The night of the change is an hour shorter, and its end comes an hour earlier.
        ("Europe/Berlin", "2026-03-29T03:59:59+00:00", 0),
        ("Europe/Berlin", "2026-03-29T04:00:00+00:00", 16 * 3600),
    ],
)
def test_a_window_over_midnight(zone: str, now: str, seconds: float) -> None:
    window = Window(start="22:00", end="06:00", time_zone=zone)
    assert window.opens_in(datetime.fromisoformat(now)) == seconds


def test_a_window_in_the_missing_hour_opens_as_the_clock_has_jumped() -> None:
    window = Window(start="02:30", end="04:00", time_zone="Europe/Berlin")
    assert window.opens_in(datetime(2026, 3, 29, 0, 30, tzinfo=UTC)) == 1800
    assert window.opens_in(datetime(2026, 3, 29, 1, 0, tzinfo=UTC)) == 0


@given(
    st.integers(0, 2 * 365 * 86400),
    st.times(),
    st.times(),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]),
)
def test_a_window_is_open_when_it_says_that_it_will_be(seconds: int, start: Any, end: Any, zone: str) -> None:
    window = Window(start=f"{start:%H:%M}", end=f"{end:%H:%M}", time_zone=zone)
    now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    wait = window.opens_in(now)
    assert 0 <= wait < 3 * 86400
    assert window.opens_in(now + timedelta(seconds=wait)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": "7:00", "end": "08:00"},
        {"start": "24:00", "end": "08:00"},
        {"start": "22:00", "end": "06:00", "time_zone": "Mars/Olympus"},
        {"start": "22:00", "end": "06:00", "time_zone": "../etc/passwd"},
    ],
)
def test_a_window_that_cannot_be_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Window(**wrong)
