"""What is new in a listing, against the one before: both are read in a stream, in the order of their keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from inferq.storage.batches.lines import SourceUnusable


class Seen(NamedTuple):
    """An object as it was when it was listed."""

    key: str
    etag: str


def with_news(listing: Iterable[Seen], before: Iterable[Seen]) -> Iterator[tuple[Seen, bool]]:
    """The listing's objects, each with whether it is new: of a key or an ETag that was not there before.

    Both are in the order of their keys; what is there no longer is passed over. In constant memory. Raises
    SourceUnusable where the listing is out of order, as in S3's directory buckets.
    """
    known = iter(before)
    old = next(known, None)
    last: str | None = None
    for seen in listing:
        if last is not None and seen.key <= last:
            raise SourceUnusable(
                f"the bucket lists {seen.key!r} behind {last!r}: what is new can only be told where keys "
                "come in order; set only_new = false"
            )
        last = seen.key
        while old is not None and old.key < seen.key:
            old = next(known, None)
        yield seen, old != seen
