"""The interface of the object stores: S3 or a local folder.

InferqError
├── ObjectNotFound   no object has that key
├── BadObjectKey     no store can hold that key
└── Outage
    └── StoreOutage  the store is unavailable, full, or refuses access
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, TypeVar

from inferq.schemas import InferqError, Outage

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
Pieces = Generator[bytes, None, None]
DEFAULT_TYPE = "application/octet-stream"
RESERVED_FOLDER = ".inferq"
"""The first segment of keys that a store reserves for itself."""

_MAX_KEY_BYTES = 900  # S3 allows 1024, including the store's prefix.
_MAX_SEGMENT_BYTES = 255  # The longest file name in common file systems.


class ObjectNotFound(InferqError):
    """No object has that key."""

    code = "object_not_found"


class BadObjectKey(InferqError):
    """Not every store can hold that key."""

    code = "bad_object_key"


class StoreOutage(Outage):
    """The object store is unavailable, full, or refuses access."""

    code = "store_unavailable"


class StoreUnreachable(StoreOutage):
    """The object store gave no answer. The message may have its address, which is for operators only."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object's properties. `content_type` is empty in a listing, since S3 does not list it."""

    key: str
    bytes: int
    content_type: str
    modified: datetime
    etag: str


class ObjectStore(ABC):
    """Objects by key. A key consists of segments of printable Unicode, separated by `/`, in every store.

    Every method may raise StoreOutage, and BadObjectKey for a key that `check_key` refuses. Safe from many
    threads. Creating an instance touches neither disk nor network.
    """

    remote = False
    """Whether each call costs a round trip over a network."""

    @abstractmethod
    def put(
        self,
        key: str,
        data: bytes | BinaryIO | Path,
        *,
        content_type: str = DEFAULT_TYPE,
    ) -> ObjectInfo:
        """Store or replace an object. Readers see the old one or the new one, never a part.

        A stream needs only `read(n)`; streams and files are stored in constant memory. An error that the stream's
        `read` raises passes through, and the old object stays.
        """

    @abstractmethod
    def create(self, key: str, data: bytes, *, content_type: str) -> bool:
        """Store an object unless the key exists. Of several concurrent callers, exactly one gets True."""

    def create_many(self, items: Sequence[tuple[str, bytes]], *, content_type: str) -> Sequence[bool]:
        """The same for many keys and their data, in less time: what `create` returns for each, in order.

        Raises the error of one that fails; each of the others may have been stored or not.
        """
        return [self.create(key, data, content_type=content_type) for key, data in items]

    def side_by_side(self, calls: Sequence[Callable[[], T]]) -> Sequence[T]:
        """Make calls that use this store, at the same time if each waits for the network; what each returns.

        Raises the error of one that fails; none is in progress any more.
        """
        return [call() for call in calls]

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""

    @abstractmethod
    def stream(self, key: str, *, chunk_bytes: int = CHUNK_BYTES, start: int = 0) -> Pieces:
        """The object from byte `start`, in pieces of at most `chunk_bytes`; none if it is not longer than `start`.

        The call itself raises ObjectNotFound. Close the generator if you do not read it to its end.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Raises ObjectNotFound."""

    @abstractmethod
    def list(
        self, prefix: str = "", *, start_after: str = "", limit: int | None = None
    ) -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix`, in the UTF-8 order of their keys; the first `limit` of them.

        Give a `limit` if you need few: S3 otherwise answers with a thousand.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""

    @abstractmethod
    def location(self, key: str) -> str:
        """The object's URL for people and tools: `s3://bucket/...` or `file:///...`."""

    def holds(self, url: str) -> bool:
        """Whether a URL like those of `location` points into this store.

        Some S3 servers read `a//b` as `a/b`, so that repeated slashes count as one.
        """
        scheme, sign, rest = url.partition("://")
        if scheme == "s3":
            url = scheme + sign + re.sub("/+", "/", rest)
        return url.startswith(self.location("x").removesuffix("x"))

    @abstractmethod
    def ping(self) -> None:
        """Raises StoreOutage if the store cannot be used; the message says why and what to do."""


def side_by_side(threads: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> Sequence[T]:
    """Make the calls on the threads and wait for all of them. Raises the error of one that fails."""
    futures = [threads.submit(call) for call in calls]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def vanished(store: ObjectStore, key: str) -> StoreOutage:
    """The error for an object that the store calls present and then absent: neither answer can be believed."""
    return StoreOutage(f"the object store has {store.location(key)}, and then has not: it contradicts itself")


def check_key(key: str) -> str:
    """Return the key. Raises BadObjectKey if a store could not hold it, or it would leave its folder."""
    fault = _fault(key)
    if fault:
        raise BadObjectKey(f"object key {key[:200]!r} {fault}")
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix of a listing; only its complete segments are checked."""
    head, slash, _ = prefix.rpartition("/")
    if slash:
        check_key(head)
    return prefix


def clean_type(content_type: str) -> str:
    """The content type, or the default if it is invalid in an HTTP header."""
    plain = content_type.isascii() and content_type.isprintable() and 0 < len(content_type) <= 255
    return content_type if plain else DEFAULT_TYPE


def _fault(key: str) -> str | None:
    if not key:
        return "is empty"
    if not key.isascii():
        try:
            raw = key.encode()
        except UnicodeEncodeError:
            return "is not valid Unicode"
    else:
        raw = key.encode()
    if len(raw) > _MAX_KEY_BYTES:
        return f"is longer than {_MAX_KEY_BYTES} bytes"
    if not key.isprintable() and any(ord(c) < 0x20 or ord(c) == 0x7F for c in key):
        return "holds a control character"
    segments = key.split("/")
    if segments[0] == RESERVED_FOLDER:
        return f"begins with {RESERVED_FOLDER}/, which the store reserves"
    for segment in segments:
        if segment in {"", ".", ".."}:
            return f"has the segment {segment!r}"
        if len(raw) > _MAX_SEGMENT_BYTES and len(segment.encode()) > _MAX_SEGMENT_BYTES:
            return f"has a segment longer than {_MAX_SEGMENT_BYTES} bytes"
    return None
