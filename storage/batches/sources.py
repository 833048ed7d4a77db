"""Turns the source that a batch names into the JSONL to feed, once.

An upload is fed unchanged. An S3 source is copied or listed first, so later changes in S3 do not affect the batch.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from inferq.schemas import Batch, InvalidTask
from inferq.schemas.batch_source import JSONL_ENDINGS, defaults_of, input_field, line_of
from inferq.schemas.s3_url import split_s3_prefix
from inferq.storage.batches.lines import (
    Line,
    SourceRefused,
    SourceUnusable,
    is_gzip,
    named_id,
    read_lines,
    unpacked,
)
from inferq.storage.batches.store import BatchSource, BatchStore, input_key
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import ObjectInfo, ObjectNotFound, ObjectStore
from inferq.storage.settings import StorageSettings

_JSONL = "application/x-ndjson"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""The beginning of a file written by `>` in Windows PowerShell."""
_COMMIT_LINES = 50_000
_TASK_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Cursor(NamedTuple):
    """The processed part of a source: its last line, and the byte where that ends."""

    line: int = 0
    offset: int = 0


class Sources:
    """The sources of batches. Every method may raise StoreOutage."""

    def __init__(self, store: ObjectStore, batches: BatchStore, settings: StorageSettings) -> None:
        self._store = store
        self._batches = batches
        self._settings = settings

    def settle(self, batch: Batch, alive: Callable[[], None] = lambda: None) -> BatchSource:
        """The JSONL to feed: recorded earlier, or made now.

        Making it may take long; `alive` is called very often meanwhile. Raises SourceUnusable if the source is
        empty or not allowed.
        """
        known = self._batches.source(batch.tenant, batch.batch_id)
        if known is not None:
            return known
        return self._batches.keep_source(
            batch.tenant, batch.batch_id, self._survey(batch, self._fetch(batch, alive), alive)
        )

    @contextmanager
    def lines(self, source: BatchSource, cursor: Cursor = Cursor()) -> Iterator[Iterator[Line]]:  # noqa: B008
        """The source's lines after the cursor."""
        with self._pieces(source.key, packed=source.gzip, start=cursor.offset) as pieces:
            yield read_lines(pieces, line=cursor.line, offset=cursor.offset)

    def own_ids(self, source: BatchSource) -> Iterator[str]:
        """The distinct task ids that the lines name. Raises SourceUnusable."""
        if not source.own_ids:
            return
        with self.lines(source) as lines, self.taken(source) as taken:
            for line in lines:
                task_id = named_id(line.content)
                if task_id is not None and _TASK_ID.fullmatch(task_id) and taken.by(line.number) is None:
                    yield task_id

    @contextmanager
    def taken(self, source: BatchSource, *, after: int = 0) -> Iterator[DuplicateIds]:
        """The lines after `after` whose task id an earlier line has."""
        if source.taken is None:
            yield DuplicateIds(iter(()))
            return
        with self._pieces(source.taken) as pieces:
            pairs = (json.loads(line.content or b"") for line in read_lines(pieces))
            yield DuplicateIds((line, first) for line, first in pairs if line > after)

    @contextmanager
    def _pieces(self, key: str, *, packed: bool = False, start: int = 0) -> Iterator[Iterator[bytes]]:
        try:
            chunks = self._store.stream(key, start=0 if packed else start)
        except ObjectNotFound as error:
            raise SourceRefused(
                "the source is missing from the object store: submit the batch again"
            ) from error
        with closing(chunks):
            yield _behind(unpacked(chunks), start) if packed else chunks

    def objects(self, source: str) -> Iterator[ObjectInfo]:
        """The inputs below an `s3://bucket/prefix`, in key order; perhaps none.

        Raises SourceUnusable if listing is not allowed.
        """
        try:
            bucket, prefix = split_s3_prefix(source)
        except InvalidTask as error:
            raise SourceUnusable(f"source {source}: {error.message}") from error
        self._check_bucket(bucket, prefix)
        return self._inputs(bucket, prefix)

    def _fetch(self, batch: Batch, alive: Callable[[], None]) -> str:
        """The key of a JSONL object with the batch's lines."""
        scheme, _, rest = batch.source.partition(":")
        try:
            if scheme == "inferq":
                key = upload_key(batch.tenant, rest)
                self._store.stat(key)
                return key
            bucket, name = split_s3_prefix(batch.source)
            self._check_bucket(bucket, name)
            key = input_key(batch.tenant, batch.batch_id, secrets.token_hex(8))
            if name.endswith(JSONL_ENDINGS):
                self._copy(bucket, name, key, alive)
            else:
                self._list(batch, bucket, name, key, alive)
        except ObjectNotFound as error:
            raise SourceRefused(f"there is no {batch.source}: upload it first, or correct it") from error
        except InvalidTask as error:
            raise SourceUnusable(f"source {batch.source}: {error.message}") from error
        return key

    def _check_bucket(self, bucket: str, name: str) -> None:
        if bucket not in self._settings.fetch_s3_buckets:
            raise SourceUnusable(
                f"inputs from bucket {bucket!r} are not allowed; an operator can allow it with "
                "INFERQ_FETCH_S3_BUCKETS"
            )
        if self._store.holds(f"s3://{bucket}/{name}"):
            raise SourceUnusable("results and uploads of inferq cannot be a source: copy them elsewhere")

    def _copy(self, bucket: str, name: str, key: str, alive: Callable[[], None]) -> None:
        from inferq.storage.objects.s3 import BucketNotFound, S3Refused, open_object

        try:
            _, chunks = open_object(self._settings.s3_endpoint_url, bucket, name)
        except (BucketNotFound, S3Refused) as error:
            raise _refused(bucket) from error
        with closing(chunks):
            self._store.put(key, cast(BinaryIO, _File(_each(chunks, alive))), content_type=_JSONL)

    def _list(self, batch: Batch, bucket: str, prefix: str, key: str, alive: Callable[[], None]) -> None:
        field = input_field(defaults_of(batch))
        lines = _each(_listed_lines(field, bucket, self._objects(bucket, prefix)), alive)
        self._store.put(key, cast(BinaryIO, _File(lines)), content_type=_JSONL)

    def _objects(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        found = self._inputs(bucket, prefix)
        first = next(found, None)
        if first is None:
            raise SourceUnusable(
                f"there are no objects under s3://{bucket}/{prefix}: check the prefix; nothing was fed"
            )
        yield first
        yield from found

    def _inputs(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        from inferq.storage.objects.s3 import BucketNotFound, S3Refused, list_bucket

        found = list_bucket(self._settings.s3_endpoint_url, bucket, prefix)
        try:
            for each in found:
                # Skip the store's own objects: the next run would take results as inputs.
                if _is_input(each) and not self._store.holds(f"s3://{bucket}/{each.key}"):
                    yield each
        except (BucketNotFound, S3Refused) as error:
            raise _refused(bucket) from error

    def _survey(self, batch: Batch, key: str, alive: Callable[[], None]) -> BatchSource:
        """Read the source once to count its lines and to find duplicate task ids."""
        with closing(self._store.stream(key)) as chunks:
            head = next((chunk for chunk in chunks if chunk), b"")
        packed = is_gzip(head)
        lines = blank = 0
        with (
            self._pieces(key, packed=packed) as pieces,
            tempfile.TemporaryDirectory(prefix="inferq-ids-") as folder,
            closing(_Ids(Path(folder))) as ids,
        ):
            for line in read_lines(_each(pieces, alive)):
                lines = line.number
                if lines == 1 and line.content and line.content.startswith(_UTF_16):
                    raise SourceUnusable("the source is UTF-16: save it as UTF-8 and submit that")
                if line.blank:
                    blank += 1
                elif (task_id := named_id(line.content)) is not None and _TASK_ID.fullmatch(task_id):
                    # Other ids make the line invalid anyway, and SQLite refuses some (a lone surrogate).
                    ids.add(task_id, line.number)
            if lines == blank:
                raise SourceUnusable("the source has no line with a task: the batch is empty")
            taken = None
            duplicates = ids.duplicates()
            if duplicates is not None:
                taken = input_key(batch.tenant, batch.batch_id, f"taken-{secrets.token_hex(8)}")
                self._store.put(taken, duplicates, content_type=_JSONL)
            own_ids = ids.any
        return BatchSource(key=key, gzip=packed, lines=lines, blank=blank, taken=taken, own_ids=own_ids)


class DuplicateIds:
    """Lines whose task id an earlier line has. Ask in line order."""

    def __init__(self, pairs: Iterator[tuple[int, int]]) -> None:
        self._pairs = pairs
        self._next = next(pairs, None)

    def by(self, line: int) -> int | None:
        """The earlier line with the same id as `line`; None if its id is unique."""
        while self._next is not None and self._next[0] < line:
            self._next = next(self._pairs, None)
        return self._next[1] if self._next is not None and self._next[0] == line else None


class _Ids:
    """Task ids on disk, since there may be millions. An id belongs to the first line that names it."""

    def __init__(self, folder: Path) -> None:
        self._list = folder / "taken.jsonl"
        self._file = self._list.open("wb")
        self._found = 0
        self._database: sqlite3.Connection | None = None
        self._path = folder / "ids.sqlite"
        self._added = 0

    @property
    def any(self) -> bool:
        return self._database is not None

    def add(self, task_id: str, line: int) -> None:
        if self._database is None:
            self._database = sqlite3.connect(self._path, isolation_level=None)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16384"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
            self._database.execute("BEGIN")
        if self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (task_id, line)).rowcount == 0:
            (first,) = self._database.execute("SELECT line FROM ids WHERE id = ?", (task_id,)).fetchone()
            self._file.write(f"[{line},{first}]\n".encode())
            self._found += 1
        self._added += 1
        if self._added % _COMMIT_LINES == 0:
            self._database.execute("COMMIT")
            self._database.execute("BEGIN")

    def duplicates(self) -> Path | None:
        """A file of `[line, first line]`, in line order; None without duplicates."""
        self._file.close()
        return self._list if self._found else None

    def close(self) -> None:
        self._file.close()
        if self._database is not None:
            self._database.close()


class _File:
    """A file object over pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, count: int = -1) -> bytes:
        found, held = [self._rest], len(self._rest)
        while count < 0 or held < count:
            piece = next(self._pieces, None)
            if piece is None:
                break
            found.append(piece)
            held += len(piece)
        whole = b"".join(found)
        if count < 0:
            count = held
        self._rest = whole[count:]
        return whole[:count]


def _listed_lines(field: str, bucket: str, objects: Iterator[ObjectInfo]) -> Iterator[bytes]:
    for found in objects:
        url = f"s3://{bucket}/{found.key}"
        yield line_of(field, url, url, etag=found.etag)


def _is_input(found: ObjectInfo) -> bool:
    return not found.key.endswith("/") and found.bytes > 0


def _refused(bucket: str) -> SourceRefused:
    return SourceRefused(
        f"bucket {bucket!r} does not exist or cannot be read: the credentials need s3:ListBucket and "
        "s3:GetObject"
    )


def _each(pieces: Iterator[bytes], then: Callable[[], None]) -> Iterator[bytes]:
    """The pieces; calls `then` after each."""
    for piece in pieces:
        yield piece
        then()


def _behind(pieces: Iterator[bytes], start: int) -> Iterator[bytes]:
    """The pieces from byte `start` on."""
    for piece in pieces:
        if start >= len(piece):
            start -= len(piece)
            continue
        yield piece[start:]
        start = 0
