"""The metrics of a worker, for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from inferq.schemas import Timings

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class WorkerMetrics:
    """One worker's metrics, in a registry of their own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    tasks: Counter = field(init=False)
    stage_seconds: Histogram = field(init=False)
    busy_slots: Gauge = field(init=False)
    ready_slots: Gauge = field(init=False)
    paused: Gauge = field(init=False)
    engine_starts: Counter = field(init=False)
    engine_deaths: Counter = field(init=False)
    engine_replacements: Counter = field(init=False)
    without_redis: Gauge = field(init=False)
    status_outages: Counter = field(init=False)
    repeated_runs: Counter = field(init=False)
    unleased_runs: Counter = field(init=False)
    _stages: dict[tuple[str, str], Histogram] = field(init=False)

    def __post_init__(self) -> None:
        def add(name: str, metric: Counter | Gauge | Histogram) -> None:
            object.__setattr__(self, name, metric)

        registry = self.registry
        add(
            "tasks",
            Counter(
                "inferq_worker_tasks",
                "Deliveries settled, by outcome: succeeded, failed, cancelled, retried, skipped, given_back, "
                "deferred, duplicate.",
                ["task_type", "outcome"],
                registry=registry,
            ),
        )
        add(
            "stage_seconds",
            Histogram(
                "inferq_worker_stage_seconds",
                "Seconds per stage of a task that succeeded: queued, fetch, inference, upload.",
                ["task_type", "stage"],
                buckets=_SECONDS,
                registry=registry,
            ),
        )
        object.__setattr__(self, "_stages", {})
        add("busy_slots", Gauge("inferq_worker_busy_slots", "Slots with a task in hand.", registry=registry))
        add(
            "ready_slots",
            Gauge("inferq_worker_ready_slots", "Slots with a loaded engine.", registry=registry),
        )
        add(
            "paused",
            Gauge(
                "inferq_worker_paused",
                "1 while the worker waits for a service that is unavailable.",
                ["service"],
                registry=registry,
            ),
        )
        add(
            "without_redis",
            Gauge(
                "inferq_worker_without_redis",
                "1 while Redis is unavailable and the worker goes on without it.",
                registry=registry,
            ),
        )
        add("engine_starts", Counter("inferq_engine_starts", "Engine processes loaded.", registry=registry))
        add(
            "engine_deaths",
            Counter("inferq_engine_deaths", "Engine processes that ended during a run.", registry=registry),
        )
        add(
            "engine_replacements",
            Counter(
                "inferq_engine_replacements",
                "Engine processes replaced, by the reason: max_tasks, memory (it grew), out_of_memory.",
                ["reason"],
                registry=registry,
            ),
        )
        add(
            "status_outages",
            Counter("inferq_status_outages", "Status changes that Redis did not take.", registry=registry),
        )

        add(
            "repeated_runs",
            Counter(
                "inferq_worker_repeated_runs",
                "Runs that succeeded after another run of the task: their results were discarded.",
                ["task_type"],
                registry=registry,
            ),
        )
        add(
            "unleased_runs",
            Counter(
                "inferq_worker_unleased_runs",
                "Runs that began without a lease, because Redis was unavailable.",
                ["task_type"],
                registry=registry,
            ),
        )

    def observe(self, task_type: str, timings: Timings) -> None:
        """Count the stages of a task that succeeded."""
        for stage, seconds in timings:
            if seconds is None:
                continue
            key = (task_type, stage)
            if key not in self._stages:
                self._stages[key] = self.stage_seconds.labels(*key)
            self._stages[key].observe(seconds)
