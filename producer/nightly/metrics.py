"""Prometheus metrics of beat."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

from inferq.schemas.trace_metrics import SpansDropped

Outcome = Literal["started", "known", "failed"]


class BeatMetrics:
    """The metrics of one beat. The file of schedules bounds their labels: a removed schedule loses its series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(SpansDropped())
        self._runs = Counter(
            "inferq_beat_runs",
            "Runs that were due, by outcome: started; known (started before); failed (still retrying, each try).",
            ["schedule", "outcome"],
            registry=self.registry,
        )
        self._last = Gauge(
            "inferq_beat_last_run_timestamp_seconds",
            "Scheduled time of the last due run that has started (Unix seconds).",
            ["schedule"],
            registry=self.registry,
        )

    def due(self, schedule: str, scheduled_at: datetime, outcome: Outcome) -> None:
        """Count what became of a run that was due."""
        self._runs.labels(schedule, outcome).inc()
        if outcome != "failed":
            self._last.labels(schedule).set(scheduled_at.timestamp())

    def forget(self, schedule: str) -> None:
        """Drop the series of a schedule that the file no longer has."""
        for outcome in ("started", "known", "failed"):
            with suppress(KeyError):
                self._runs.remove(schedule, outcome)
        with suppress(KeyError):
            self._last.remove(schedule)
