"""Prometheus metrics of callback delivery."""

from __future__ import annotations

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from inferq.schemas.metrics import SECONDS


class CallbackMetrics:
    """The metrics of one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.outcomes = Counter(
            "inferq_callbacks",
            "Attempts to deliver a callback, by outcome: delivered, again (retried), failed.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("delivered", "again", "failed"):
            self.outcomes.labels(outcome)  # 0 from the start: Prometheus counts no rise from an absent series
        self.seconds = Histogram(
            "inferq_callback_seconds",
            "Duration of an attempt to deliver a callback, in seconds.",
            buckets=SECONDS,
            registry=registry,
        )
        self.deferred = Counter(
            "inferq_callbacks_deferred",
            "Callbacks deferred because their target was at its limit of callbacks in flight.",
            registry=registry,
        )
        self.in_flight = Gauge(
            "inferq_callbacks_in_flight", "Callbacks being sent to their receivers.", registry=registry
        )


@cache
def metrics_in(registry: CollectorRegistry) -> CallbackMetrics:
    """The metrics in a registry, which has them once, however often a process makes its jobs."""
    return CallbackMetrics(registry)
