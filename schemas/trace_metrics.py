"""The metric of a part's tracing, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from inferq.schemas import tracing


class SpansDropped(Collector):
    """Counts the spans of this process that were not exported; 0 while tracing is off."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "inferq_trace_spans_dropped",
            "Spans that were not exported: the collector was slow, refused them, or was unavailable.",
            value=tracing.spans_dropped(),
        )
