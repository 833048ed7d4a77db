"""W3C Trace Context: the place in a trace that travels with requests and messages.

https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

_CHARACTERS = 512
"""The longest header that is passed on."""

_IDS = r"(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
# A later version may append fields; version ff is none.
_is_traceparent = re.compile(rf"00-{_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS}(-[!-~]*)?").fullmatch
_is_tracestate = re.compile(r"[\t -~]+").fullmatch


class TraceContext(NamedTuple):
    """A span of a trace, as its two headers name it."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """The id of the trace: 32 hexadecimal digits."""
        return self.traceparent[3:35]

    @property
    def sampled(self) -> bool:
        """Whether the part before this one records the trace."""
        return bool(int(self.traceparent[53:55], 16) & 1)

    def headers(self) -> dict[str, str]:
        """The headers of a request or message that continues the trace."""
        headers = {TRACEPARENT: self.traceparent}
        if self.tracestate:
            headers[TRACESTATE] = self.tracestate
        return headers


def trace_context(headers: Mapping[str, Any]) -> TraceContext | None:
    """The trace that these headers continue; None if they name none, or if `traceparent` is broken.

    The values may be of any type: they come from producers.
    """
    traceparent = headers.get(TRACEPARENT)
    if traceparent is None or not _valid(traceparent, _is_traceparent):
        return None
    tracestate = headers.get(TRACESTATE)
    return TraceContext(traceparent, tracestate if _valid(tracestate, _is_tracestate) else "")


def _valid(value: object, matches: Callable[[str], object]) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= _CHARACTERS and matches(value) is not None
