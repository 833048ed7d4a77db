from __future__ import annotations

import pytest

from inferq.schemas.trace_context import TraceContext, trace_context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_the_headers_of_a_trace_are_read_and_written_again() -> None:
    headers = {"traceparent": GOOD, "tracestate": "vendor=a,other=b"}
    context = trace_context(headers)
    assert context == TraceContext(GOOD, "vendor=a,other=b")
    assert context.trace_id == TRACE
    assert context.headers() == headers


def test_a_later_version_may_have_more_fields() -> None:
    context = trace_context({"traceparent": f"01-{TRACE}-{SPAN}-01-more"})
    assert context is not None
    assert context.trace_id == TRACE


@pytest.mark.parametrize(
    "broken",
    [
        None, "", 7, b"bytes", GOOD.upper(), GOOD[:-1], f"{GOOD}-more", f" {GOOD}", f"{GOOD}\n",
        f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"01-{TRACE}-{SPAN}-01-" + "x" * 512,
    ],
)  # fmt: skip
def test_a_broken_traceparent_counts_as_none(broken: object) -> None:
    assert trace_context({"traceparent": broken, "tracestate": "vendor=a"}) is None


@pytest.mark.parametrize("broken", ["", 7, "é", "a=b\r\nx: y", "x" * 513])
def test_a_broken_tracestate_is_left_out(broken: object) -> None:
    assert trace_context({"traceparent": GOOD, "tracestate": broken}) == TraceContext(GOOD)
