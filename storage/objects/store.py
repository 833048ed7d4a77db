"""Objects: named, immutable-at-once blobs in S3 or in a local folder, behind one interface.

InferqError
├── ObjectNotFound   nothing stands under that key
├── BadObjectKey     the key itself is impossible
└── Outage
    └── StoreOutage  the store cannot be reached or does not let us
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from inferq.schemas import InferqError, Outage

CHUNK_BYTES = 1 << 20
Pieces = Generator[bytes, None, None]
DEFAULT_TYPE = "application/octet-stream"
MAX_SIGNED_SECONDS = 7 * 86400
"""The longest that S3 lets a signed URL live (Signature Version 4)."""
RESERVED_FOLDER = ".inferq"
"""The first segment of keys that a store keeps for itself."""

_MAX_KEY_BYTES = 900  # S3 allows 1024, which has to hold the store's prefix as well.
_MAX_SEGMENT_BYTES = 255  # The longest file name of every common file system.


class ObjectNotFound(InferqError):
    """Nothing stands under that key."""

    code = "object_not_found"


class BadObjectKey(InferqError):
    """The key is not one that every store can hold."""

    code = "bad_object_key"


class StoreOutage(Outage):
    """The object store is away, full, or does not let us."""

    code = "store_unavailable"


@dataclass(frozen=True)
class ObjectInfo:
    """What is known of an object. `content_type` is empty in a listing, as S3's listings do not tell it."""

    key: str
    bytes: int
    content_type: str
    modified: datetime
    etag: str


class ObjectStore(ABC):
    """Objects by key. A key is `/`-separated segments of printable Unicode, the same for every store.

    Every method may raise StoreOutage, and BadObjectKey for a key that `check_key` refuses. An instance is
    safe to use from many threads, and making one touches neither disk nor network.
    """

    @abstractmethod
    def put(
        self,
        key: str,
        data: bytes | BinaryIO | Path,
        *,
        content_type: str = DEFAULT_TYPE,
    ) -> ObjectInfo:
        """Store an object, replacing what stands there. Readers see the old one or the new, never a part.

        A stream needs only `read(n)`; streams and files are stored in constant memory. What the stream's
        `read` raises passes through, and leaves what stood there.
        """

    @abstractmethod
    def create(self, key: str, data: bytes, *, content_type: str) -> bool:
        """Store an object unless one stands there. Of any number of racing callers one gets True."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""

    @abstractmethod
    def stream(self, key: str, *, chunk_bytes: int = CHUNK_BYTES, start: int = 0) -> Pieces:
        """The object from byte `start` on, in pieces of at most `chunk_bytes`; none where it is no longer.

        Raises ObjectNotFound at the call itself.

        Whoever leaves it before its end closes it.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Raises ObjectNotFound."""

    @abstractmethod
    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix`, by the UTF-8 order of their keys."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; that none stands there is no error."""

    @abstractmethod
    def location(self, key: str) -> str:
        """Where the object is, as a URL for people and tools: `s3://bucket/...` or `file:///...`."""

    def holds(self, url: str) -> bool:
        """Whether the URL, of the form that `location` gives, leads into this store."""
        return url.startswith(self.location("x").removesuffix("x"))

    @abstractmethod
    def signed_url(self, key: str, *, seconds: int) -> str:
        """An HTTP URL that gives the object to whoever holds it, for that long (at most 7 days)."""

    @abstractmethod
    def ping(self) -> None:
        """Raises StoreOutage, saying what is wrong and what to do, where the store could not be used."""


def check_key(key: str) -> str:
    """The key itself. Raises BadObjectKey where a store could not hold it, or it would leave its folder."""
    fault = _fault(key)
    if fault:
        raise BadObjectKey(f"object key {key[:200]!r} {fault}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix of a listing; only its whole segments have to be good ones."""
    head, slash, _ = prefix.rpartition("/")
    if slash:
        check_key(head)
    return prefix


def clean_type(content_type: str) -> str:
    """The content type, or the default where it could not stand in an HTTP header."""
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
        return f"begins with {RESERVED_FOLDER}/, which the store keeps for itself"
    for segment in segments:
        if segment in {"", ".", ".."}:
            return f"has {segment!r} for a segment"
        if len(raw) > _MAX_SEGMENT_BYTES and len(segment.encode()) > _MAX_SEGMENT_BYTES:
            return f"has a segment longer than {_MAX_SEGMENT_BYTES} bytes"
    return None
