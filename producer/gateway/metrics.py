"""The gateway's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from inferq.schemas.metrics import SECONDS, BoundedLabel
from inferq.schemas.trace_metrics import SpansDropped

_TYPES = 100
"""How many task types of ended tasks are counted by name: they come from records, not from what is installed here."""


class Metrics:
    """One gateway's metrics, in a registry of their own: a process may run two gateways."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(SpansDropped())
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self.requests = Counter(
            "inferq_http_requests",
            "HTTP requests by method, route template and status.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "inferq_http_request_seconds",
            "Seconds until an HTTP answer was complete, by method and route template.",
            ["method", "route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.tasks_submitted = Counter(
            "inferq_tasks_submitted",
            "Tasks that the broker has confirmed, by type.",
            ["task_type"],
            registry=self._registry,
        )
        self._ended = Counter(
            "inferq_tasks_ended",
            "Tasks that ended, by status (succeeded, failed, cancelled) and error code, empty for a success.",
            ["task_type", "status", "error_code"],
            registry=self._registry,
        )
        self._type = BoundedLabel(_TYPES)
        self.publish_seconds = Histogram(
            "inferq_publish_seconds",
            "Seconds until the broker confirmed a task.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.uploaded_bytes = Counter(
            "inferq_uploaded_bytes", "Bytes of files uploaded.", registry=self._registry
        )
        self.event_streams = Gauge(
            "inferq_event_streams", "Event streams that are open now.", registry=self._registry
        )

    def cancelled(self, task_type: str) -> None:
        """Count a cancelled task that no worker took."""
        self._ended.labels(self._type(task_type), "cancelled", "cancelled").inc()

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)
