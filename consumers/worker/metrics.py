"""The metrics of a worker, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from inferq.consumers.probes.children import Children
from inferq.consumers.probes.ends import TaskEnds
from inferq.consumers.worker.engine_clock import EngineClock, Step
from inferq.schemas import Result, Timings
from inferq.schemas.metrics import SECONDS, BoundedLabel

Stage = Literal["parse", "queued", "fetch", "inference", "upload"]
"""Where an attempt fails. `queued` is before the run, `upload` everything after it."""

_CODES = 100
"""How many error codes a worker counts by name. An engine's plug-in chooses its own."""


class _EngineTime(Collector):
    """The seconds of all engines, of each task type."""

    def __init__(self) -> None:
        self.clocks: list[tuple[str, EngineClock]] = []

    def collect(self) -> Iterator[CounterMetricFamily]:
        busy = CounterMetricFamily(
            "inferq_engine_busy_seconds", "Seconds in which engines computed.", labels=["task_type"]
        )
        alive = CounterMetricFamily(
            "inferq_engine_alive_seconds", "Seconds in which engines were loaded.", labels=["task_type"]
        )
        waiting = CounterMetricFamily(
            "inferq_engine_waiting_seconds",
            "Seconds in which loaded engines waited for a task, for its input, or for its result to be stored.",
            labels=["task_type", "for"],
        )
        spent: dict[str, dict[Step, float]] = {}
        for task_type, clock in self.clocks:
            total = spent.setdefault(task_type, dict.fromkeys(clock.seconds(), 0.0))
            for step, seconds in clock.seconds().items():
                total[step] += seconds
        for task_type, total in spent.items():
            alive.add_metric([task_type], sum(total.values()))
            busy.add_metric([task_type], total.pop("computing"))
            for step, seconds in total.items():
                waiting.add_metric([task_type, step], seconds)
        yield from (busy, alive, waiting)


@dataclass(frozen=True)
class WorkerMetrics:
    """One worker's metrics, in a registry of their own.

    `tenants`: how many tenants are counted by name. `track`: the value of the label `track`, which tells a canary's
    attempts from others. It adds no series, since a worker has one track; without a track the label is absent.
    """

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    tenants: int = 50
    track: str = ""
    stage_seconds: Histogram = field(init=False)
    busy_slots: Gauge = field(init=False)
    ready_slots: Gauge = field(init=False)
    loaded_engines: Gauge = field(init=False)
    paused: Gauge = field(init=False)
    engine_starts: Counter = field(init=False)
    engine_deaths: Counter = field(init=False)
    engine_replacements: Counter = field(init=False)
    engine_unloads: Counter = field(init=False)
    engine_lines_dropped: Counter = field(init=False)
    without_redis: Gauge = field(init=False)
    status_outages: Counter = field(init=False)
    repeated_runs: Counter = field(init=False)
    unleased_runs: Counter = field(init=False)
    _tasks: Children[Counter] = field(init=False)
    _stages: Children[Histogram] = field(init=False)
    _batch_sizes: Children[Histogram] = field(init=False)
    _batch_fill: Children[Histogram] = field(init=False)
    _batch_waits: Children[Histogram] = field(init=False)
    _failures: Children[Counter] = field(init=False)
    _dead_letters: Children[Counter] = field(init=False)
    _cache_requests: Children[Counter] = field(init=False)
    _tenant_seconds: Children[Counter] = field(init=False)
    _tenant_tasks: Children[Counter] = field(init=False)
    _ends: TaskEnds = field(init=False)
    _engine_time: _EngineTime = field(default_factory=_EngineTime)

    def __post_init__(self) -> None:
        def add(name: str, metric: object) -> None:
            object.__setattr__(self, name, metric)

        def count(name: str, metric: str, text: str, labels: list[str], **bounds: BoundedLabel) -> None:
            add(name, Children(Counter(metric, text, labels, registry=registry), **bounds))

        def observe(name: str, metric: str, text: str, buckets: Sequence[float]) -> None:
            add(name, Children(Histogram(metric, text, ["task_type"], buckets=buckets, registry=registry)))

        registry = self.registry
        registry.register(self._engine_time)
        tenants = BoundedLabel(self.tenants)
        track = ["track"] if self.track else []
        add("_ends", TaskEnds(registry))
        count(
            "_tasks",
            "inferq_worker_tasks",
            "Deliveries settled, by outcome: succeeded, failed, cancelled, retried, skipped, given_back, "
            "deferred, duplicate, waiting.",
            ["task_type", "outcome", *track],
        )
        count(
            "_failures",
            "inferq_task_failures",
            "Attempts that failed, by the stage in which they failed and the error code.",
            ["task_type", "stage", "error_code", *track],
            error_code=BoundedLabel(_CODES),
        )
        count(
            "_dead_letters",
            "inferq_worker_dead_letters",
            "Dead letters sent, also those of a task that was sent back and failed again.",
            ["task_type"],
        )
        count(
            "_cache_requests",
            "inferq_cache_requests",
            "Tasks looked up in the result cache, by outcome: hit, miss, waited.",
            ["task_type", "outcome"],
        )
        count(
            "_tenant_seconds",
            "inferq_tenant_engine_seconds",
            "Seconds in which an engine computed for a tenant, including failed and cancelled runs.",
            ["tenant", "task_type"],
            tenant=tenants,
        )
        count(
            "_tenant_tasks",
            "inferq_tenant_tasks",
            "Tasks of a tenant that ended.",
            ["tenant", "task_type"],
            tenant=tenants,
        )
        add(
            "stage_seconds",
            Histogram(
                "inferq_worker_stage_seconds",
                "Seconds per stage of a task that succeeded: queued, fetch, inference, upload.",
                ["task_type", "stage", *track],
                buckets=SECONDS,
                registry=registry,
            ),
        )
        add("_stages", Children(self.stage_seconds))
        observe(
            "_batch_sizes",
            "inferq_worker_batch_size",
            "Tasks that the engine computed together, of each batch.",
            (2, 4, 8, 16, 32, 64, 128, 256),
        )
        observe(
            "_batch_fill",
            "inferq_worker_batch_fill_ratio",
            "Tasks in a batch, divided by the most that it could have had.",
            (0.1, 0.25, 0.5, 0.75, 1.0),
        )
        observe(
            "_batch_waits",
            "inferq_worker_batch_wait_seconds",
            "Seconds from the arrival of a group's first task until the engine computes the group.",
            SECONDS,
        )
        add("busy_slots", Gauge("inferq_worker_busy_slots", "Slots with a task in hand.", registry=registry))
        add(
            "ready_slots",
            Gauge(
                "inferq_worker_ready_slots",
                "Slots whose engine is loaded, or loads for the next task.",
                registry=registry,
            ),
        )
        add(
            "loaded_engines",
            Gauge("inferq_worker_loaded_engines", "Slots with a loaded engine.", registry=registry),
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
            "engine_unloads",
            Counter(
                "inferq_engine_unloads",
                "Engine processes ended until a task needs them again, by the reason: idle, room (another one "
                "needs it), reload, max_tasks.",
                ["reason"],
                registry=registry,
            ),
        )
        add(
            "engine_lines_dropped",
            Counter(
                "inferq_engine_output_lines_dropped",
                "Lines that engines printed or logged too fast, and that are not in the log.",
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

    @property
    def _track(self) -> tuple[str, ...]:
        return (self.track,) if self.track else ()

    def observe(self, task_type: str, timings: Timings) -> None:
        """Count the stages of a task that succeeded."""
        for stage, seconds in vars(timings).items():
            if seconds is not None:
                self._stages(task_type, stage, *self._track).observe(seconds)

    def settled(self, task_type: str, outcome: str) -> None:
        """Count a delivery that was settled."""
        self._tasks(task_type, outcome, *self._track).inc()

    def ended(self, result: Result) -> None:
        """Count the end of a task."""
        self._ends.count(result)
        self._tenant_tasks(result.tenant, result.task_type).inc()

    def failed(self, task_type: str, stage: Stage, code: str) -> None:
        """Count an attempt that failed."""
        self._failures(task_type, stage, code, *self._track).inc()

    def dead_letter(self, task_type: str) -> None:
        """Count a dead letter that was sent."""
        self._dead_letters(task_type).inc()

    def looked_up(self, task_type: str, outcome: Literal["hit", "miss", "waited"]) -> None:
        """Count a task that was looked up in the result cache."""
        self._cache_requests(task_type, outcome).inc()

    def computed(self, tenant: str, task_type: str, seconds: float) -> None:
        """Count the seconds that an engine computed for a tenant."""
        self._tenant_seconds(tenant, task_type).inc(seconds)

    def batches(self, task_type: str, size: int, count: int, most: int) -> None:
        """Count `count` batches of `size` tasks, where `most` would have been taken."""
        for _ in range(count):
            self._batch_sizes(task_type).observe(size)
            self._batch_fill(task_type).observe(size / most)

    def batch_waited(self, task_type: str, seconds: float) -> None:
        """Count the seconds that a batch's first task was in hand before the engine computed the batch."""
        self._batch_waits(task_type).observe(seconds)

    def add_engine(self, task_type: str) -> EngineClock:
        """The clock of a further engine."""
        self._dead_letters(task_type)  # 0 from the start: Prometheus counts no rise from an absent series
        clock = EngineClock()
        self._engine_time.clocks.append((task_type, clock))
        return clock
