"""The `traceparent` header of W3C Trace Context.

https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import re

_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


def trace_id_of(traceparent: object) -> str | None:
    """The trace id (32 hex digits) of a header's value; None if the header is absent or invalid."""
    found = _TRACEPARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
    return found["trace_id"] if found else None
