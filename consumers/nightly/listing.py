"""Compares a listing with the previous one. Both are streamed in the order of their keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from inferq.storage.batches.lines import SourceUnusable


class Seen(NamedTuple):
    """An object in a listing."""

    key: str
    etag: str


def with_news(listing: Iterable[Seen], before: Iterable[Seen]) -> Iterator[tuple[Seen, bool]]:
    """The listing's objects, each with whether its key or ETag is new.

    Uses constant memory: both listings must be in key order. Raises SourceUnusable if the listing is not, as in
    S3's directory buckets.
    """
    known = iter(before)
    old = next(known, None)
    last: str | None = None
    for seen in listing:
        if last is not None and seen.key <= last:
            raise SourceUnusable(
                f"the bucket lists {seen.key!r} after {last!r}, but only_new needs keys in order; "
                "set only_new = false"
            )
        last = seen.key
        while old is not None and old.key < seen.key:
            old = next(known, None)
        yield seen, old != seen
