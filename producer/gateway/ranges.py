"""The part of a file that a request asks for (RFC 9110, section 14), so that a download can be resumed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastapi import Request

from inferq.producer.gateway.problems import ProblemError

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """The bytes to answer with, the status, and the headers that describe them."""

    bytes: range
    status: int
    headers: dict[str, str]


def requested_part(request: Request, *, size: int, etag: str) -> Part:
    """The part of a file of `size` bytes that the headers Range and If-Range ask for; `etag` includes its quotes.

    It is the whole file if several ranges are asked for, or if the file has changed. Raises ProblemError (416).
    """
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    wanted = _wanted(request, size, etag)
    if wanted is None:
        return Part(range(size), 200, headers | {"Content-Length": str(size)})
    if not wanted:
        raise ProblemError(
            416,
            "range_not_satisfiable",
            f"the file has {size} bytes, none of which lie in the range {request.headers['range'][:100]!r}",
            headers={"Content-Range": f"bytes */{size}"},
        )
    headers |= {
        "Content-Length": str(len(wanted)),
        "Content-Range": f"bytes {wanted.start}-{wanted.stop - 1}/{size}",
    }
    return Part(wanted, 206, headers)


def _wanted(request: Request, size: int, etag: str) -> range | None:
    """The range; empty if no byte of the file lies in it, None for the whole file."""
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or request.method != "GET" or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:
        return range(max(size - int(last), 0), size) if last else None
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)
