"""What the delivery of callbacks counts, in Prometheus' terms."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 15, 30)


class CallbackMetrics:
    """The metrics of one process; `busy` says how many callbacks are on their way."""

    def __init__(self, registry: CollectorRegistry, busy: Callable[[], float]) -> None:
        self.outcomes = Counter(
            "inferq_callbacks",
            "Attempts to deliver a callback, by what followed: delivered, again, failed (given up).",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "inferq_callback_seconds",
            "Seconds that an attempt to deliver a callback took.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.deferred = Counter(
            "inferq_callbacks_deferred",
            "Callbacks that were put aside, as their target had as many on their way as it may.",
            registry=registry,
        )
        self.in_flight = Gauge(
            "inferq_callbacks_in_flight", "Callbacks on their way to their receivers.", registry=registry
        )
        self.in_flight.set_function(busy)
