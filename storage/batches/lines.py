"""The lines of a JSONL source, read in constant memory, and the tasks in them.

SourceUnusable       the whole source cannot be read; a bad line raises InvalidTask
└── SourceRefused    for a reason that may pass: the source is missing, or its bucket refuses access
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from inferq.schemas import MAX_BODY_BYTES, SET_BY_FEEDER, Batch, InferqError, InvalidTask, Task, parse_task
from inferq.schemas.batch_source import defaults_of

MAX_LINES = 100_000_000
"""The most lines of one source: each needs some bits in Redis."""

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_INFLATE_BYTES = 1 << 20
_MERGED = ("options", "metadata")
_PLACE = re.compile(r" at line 1 column \d+$")
_DEFAULT_TENANT = Task.model_fields["tenant"].default


class SourceUnusable(InferqError):
    """The batch can never be fed from this source."""

    code = "source_unusable"


class SourceRefused(SourceUnusable):
    """The source is missing or its bucket refuses access, which may pass: look again before the batch fails."""


class Line(NamedTuple):
    """A line with its number, from 1. `content` excludes the line end, and is None if the line is too long.

    `end`: where the next line begins, in bytes of the unpacked source. `length`: bytes of the content.
    """

    number: int
    end: int
    content: bytes | None
    length: int

    @property
    def blank(self) -> bool:
        return self.length == 0


def is_gzip(head: bytes) -> bool:
    """Whether these are the first bytes of a gzip file (RFC 1952)."""
    return head.startswith(_GZIP)


def unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a gzip file of one or more members, in pieces. Raises SourceUnusable."""
    inflate = zlib.decompressobj(_GZIP_WINDOW)
    begun = False
    try:
        for piece in pieces:
            rest = piece
            while rest:
                if inflate.eof:
                    rest = rest.lstrip(b"\0")  # padding after a member
                    if not rest:
                        break
                    inflate = zlib.decompressobj(_GZIP_WINDOW)
                begun = True
                # Bounded: a small file may hold a thousand times its size.
                data = inflate.decompress(rest, _INFLATE_BYTES)
                if data:
                    yield data
                rest = inflate.unconsumed_tail or inflate.unused_data
    except zlib.error as error:
        raise SourceUnusable(f"the source is not an intact gzip file: {error}") from error
    if begun and not inflate.eof:
        raise SourceUnusable("the source is a truncated gzip file: upload it again")


def read_lines(pieces: Iterable[bytes], *, line: int = 0, offset: int = 0) -> Iterator[Line]:
    """The lines in `pieces`, which begin after `line`, at `offset` bytes of the source.

    Lines end with LF or CRLF; the last one may have no end. A byte order mark at the beginning is skipped. A line
    of white space is blank. At most MAX_BODY_BYTES of a line are kept in memory.
    """
    number, end = line, offset
    rest = b""
    dropped = 0  # bytes of a line that is too long
    for piece in pieces:
        whole = piece.split(b"\n")
        for part in whole[:-1]:
            number += 1
            content = rest + part if rest else part
            length = dropped + len(content)
            end += length + 1
            yield _line(number, end, content, dropped)
            rest, dropped = b"", 0
        rest += whole[-1]
        if len(rest) > MAX_BODY_BYTES + len(_BOM) + 1:
            dropped += len(rest)
            rest = b""
    if rest or dropped:
        end += dropped + len(rest)
        yield _line(number + 1, end, rest, dropped)


def _line(number: int, end: int, content: bytes, dropped: int) -> Line:
    if number > MAX_LINES:
        raise SourceUnusable(f"the source has more than {MAX_LINES:,} lines: split it into several batches")
    if number == 1 and content.startswith(_BOM):
        content = content[len(_BOM) :]
    length = dropped + len(content.removesuffix(b"\r"))
    # Including white space: the result must not depend on where the pieces are cut.
    if length > MAX_BODY_BYTES:
        return Line(number, end, None, length)
    content = content.strip(b" \t\r")
    return Line(number, end, content, len(content))


class LineParser:
    """Parses the lines of one batch into tasks; the same line always gives the same task."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._defaults = defaults_of(batch)
        inner = _json(self._defaults)[1:-1]
        self._head = b"{" + inner + (b"," if inner else b"")
        tenant = {} if batch.tenant == _DEFAULT_TENANT else {"tenant": batch.tenant}
        self._tail = _json({**tenant, "batch_id": batch.batch_id})[1:-1]
        own_type = self._defaults.get("task_type")
        self._type = own_type if isinstance(own_type, str) else None
        self._reserved = f"{batch.batch_id}."
        self._merges = any(isinstance(self._defaults.get(name), dict) for name in _MERGED)

    def parse(self, line: Line) -> Task:
        """The task in a line. Raises InvalidTask; the message says what is wrong."""
        content = line.content
        if content is None:
            raise InvalidTask(
                f"the line has {line.length} bytes, the limit of a task is {MAX_BODY_BYTES}; pass large "
                "inputs by URL",
                code="task_too_large",
            )
        own_id = self._batch.task_id(line.number)
        # Only such a line may need merging; most do not.
        if b'"batch_' in content or b'"tenant"' in content or b"\\u" in content or self._merges:
            content = self._merged(content)
        try:
            task = parse_task(self._spliced(content, own_id, line.number), expected=self._type)
        except InvalidTask as error:
            if error.code == "not_json":
                _object(content)  # raises with the place in the original line
                # Only the validating parser refuses it; its column counts the defaults, too.
                raise InvalidTask(_PLACE.sub("", error.message), code=error.code) from error
            raise
        if task.task_id != own_id and task.task_id.startswith(self._reserved):
            raise InvalidTask(
                f"task_id {task.task_id!r} is reserved for lines without a task_id: choose ids that do not begin "
                f"with {self._reserved!r}"
            )
        return task

    def _spliced(self, content: bytes, own_id: str, number: int) -> bytes:
        """The line's object with the defaults before its fields and the batch's fields after: the last one counts.

        A line that is not one complete object stays invalid.
        """
        if not (content.startswith(b"{") and content.endswith(b"}")):
            _object(content)  # raises
        inner = content[1:-1].strip()
        return b'%b"task_id":"%b",%b%b%b,"batch_line":%d}' % (
            self._head, own_id.encode(), inner, b"," if inner else b"", self._tail, number,
        )  # fmt: skip

    def _merged(self, content: bytes) -> bytes:
        """The line's object with merged options. It must not contradict the batch. Raises InvalidTask."""
        fields = _object(content)
        for name in SET_BY_FEEDER:
            if name not in fields:
                continue
            if fields[name] == getattr(self._batch, name, None) and name != "batch_line":
                del fields[name]
                continue
            why = (
                "belongs to another tenant than the batch"
                if name == "tenant"
                else "is set by the batch: leave it out"
            )
            raise InvalidTask(f"{name}: {why}, got {_shown(fields[name])}")
        for name in _MERGED:
            default, own = self._defaults.get(name), fields.get(name)
            if isinstance(default, dict) and isinstance(own, dict):
                fields[name] = default | own
        return _json(fields)


def named_id(content: bytes | None) -> str | None:
    """The task id that a line names; None if it names none or cannot be read."""
    if content is None or (b'"task_id"' not in content and b"\\u" not in content):
        return None
    try:
        found = _object(content).get("task_id")
    except InvalidTask:
        return None
    return found if isinstance(found, str) else None


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
    except json.JSONDecodeError as error:
        # Without the parser's line number, which is always 1.
        raise InvalidTask(
            f"the line is not JSON: {error.msg}: column {error.colno}", code="not_json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"the line is not JSON: {error}", code="not_json") from error
    if not isinstance(value, dict):
        raise _not_an_object(content)
    return value


def _not_an_object(content: bytes) -> InvalidTask:
    return InvalidTask(
        f"the line is not a JSON object, but {len(content)} bytes of something else", code="not_json"
    )


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]
