"""What the four Grafana boards show. `make generate` writes dashboards/*.json from it.

The figures of `inferq monitor` are joined with `max by`: two monitors report the same queues. What is unknown is
absent there, never 0.
"""

from __future__ import annotations

from k8s.monitoring.grafana import Board, Panel, Query, Row

_TYPES = 'task_type=~"$task_type"'
_TYPE = 'task_type="$task_type"'
_RATE = "[$__rate_interval]"
_NO_PROBES = '{route!~"/healthz|/readyz|/metrics"}'
_READY = 'max by (task_type, priority) (inferq_queue_messages{{state="ready",{types}}})'


def _shares(seconds: str, select: str, by: str) -> list[Query]:
    """The 50th, 95th and 99th percentile of a histogram."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return [
        Query(
            f"histogram_quantile({share / 100:g}, sum by ({labels}) (rate({seconds}_bucket{select}{_RATE})))",
            f"p{share}{legend}",
        )
        for share in (50, 95, 99)
    ]


def _failed_share(select: str) -> str:
    return (
        f'(sum(increase(inferq_tasks_ended_total{{status="failed",{select}}}[1h])) or vector(0))'
        f' / sum(increase(inferq_tasks_ended_total{{status!="cancelled",{select}}}[1h]))'
    )


def _busy_share(select: str) -> Panel:
    return Panel(
        "Engines: share of time computing",
        [
            Query(
                f"sum by (task_type) (rate(inferq_engine_busy_seconds_total{{{select}}}{_RATE}))"
                f" / sum by (task_type) (rate(inferq_engine_alive_seconds_total{{{select}}}{_RATE}))",
                "{{task_type}}",
            )
        ],
        unit="percentunit",
        most=1,
        text="Seconds computing over seconds alive, of all engines of a type.",
    )


def _waiting_for(select: str) -> Panel:
    return Panel(
        "Engines: idle, waiting for",
        [
            Query(
                f"sum by (for) (rate(inferq_engine_waiting_seconds_total{{{select}}}{_RATE}))"
                f" / ignoring (for) group_left sum(rate(inferq_engine_alive_seconds_total{{{select}}}{_RATE}))",
                "{{for}}",
            )
        ],
        unit="percentunit",
        stack=True,
        text="Share of the engines' time: input is a download, task an empty queue, result an upload.",
    )


def _workers(select: str) -> Panel:
    return Panel(
        "Workers by state",
        [Query(f"sum by (state) (max by (task_type, state) (inferq_workers{{{select}}}))", "{{state}}")],
        stack=True,
    )


def _ended(select: str, by: str) -> Panel:
    labels = [label.strip() for label in by.split(",")]
    return Panel(
        "Tasks ended per second",
        [
            Query(
                f"sum by ({by}) (rate(inferq_tasks_ended_total{{{select}}}{_RATE}))",
                " ".join(f"{{{{{label}}}}}" for label in labels),
            )
        ],
        unit="reqps",
        stack=True,
    )


def _tenants(select: str) -> Row:
    return Row(
        "Tenants",
        Panel(
            "Engine seconds per second, the ten largest tenants",
            [
                Query(
                    f"topk(10, sum by (tenant) (rate(inferq_tenant_engine_seconds_total{{{select}}}{_RATE})))",
                    "{{tenant}}",
                )
            ],
            width=12,
            stack=True,
            text="1 is one engine that computes all the time for this tenant.",
        ),
        Panel(
            "Tasks per second, the ten largest tenants",
            [
                Query(
                    f"topk(10, sum by (tenant) (rate(inferq_tenant_tasks_total{{{select}}}{_RATE})))",
                    "{{tenant}}",
                )
            ],
            width=12,
            unit="reqps",
            stack=True,
        ),
    )


_UP = {"0": ("down", "red"), "1": ("up", "green")}
_ALARM = {"0": ("none", "green"), "1": ("blocked", "red")}

_OVERVIEW = Board(
    "inferq-overview",
    "inferq: overview",
    "all",
    Row(
        "Now",
        Panel(
            "Alerts",
            [Query('count(ALERTS{alertname=~"Inferq.*",alertstate="firing"}) or vector(0)')],
            kind="stat",
            width=3,
            steps={1: "red"},
            text="Alerts of inferq that fire now.",
        ),
        Panel(
            "Services",
            [Query("max by (service) (inferq_service_up)", "{{service}}")],
            kind="stat",
            width=6,
            words=_UP,
        ),
        Panel(
            "RabbitMQ's alarms",
            [Query("max by (kind) (inferq_broker_alarm)", "{{kind}}")],
            kind="stat",
            width=4,
            words=_ALARM,
            text="While blocked, RabbitMQ accepts no messages.",
        ),
        Panel("Tasks waiting", [Query(f"sum({_READY.format(types=_TYPES)})")], kind="stat", width=3),
        Panel(
            "Longest wait",
            [Query(f"max(inferq_queue_oldest_seconds{{{_TYPES}}})")],
            kind="stat",
            width=3,
            unit="s",
            steps={300: "orange", 1800: "red"},
        ),
        Panel(
            "Failed in the last hour",
            [Query(_failed_share(_TYPES))],
            kind="stat",
            width=3,
            unit="percentunit",
            steps={0.05: "orange", 0.2: "red"},
        ),
        Panel(
            "Age of these figures",
            [Query("time() - max(inferq_monitor_last_success_timestamp_seconds)")],
            kind="stat",
            width=2,
            unit="s",
            steps={60: "orange", 120: "red"},
            text="Seconds since `inferq monitor` last succeeded.",
        ),
    ),
    Row(
        "Queues",
        Panel(
            "Tasks waiting",
            [Query(f"sum by (task_type) ({_READY.format(types=_TYPES)})", "{{task_type}}")],
            stack=True,
        ),
        Panel(
            "Longest wait",
            [Query(f"max by (task_type) (inferq_queue_oldest_seconds{{{_TYPES}}})", "{{task_type}}")],
            unit="s",
        ),
        Panel(
            "Tasks in the hands of workers",
            [
                Query(
                    "sum by (task_type) (max by (task_type, priority) "
                    f'(inferq_queue_messages{{state="unacked",{_TYPES}}}))',
                    "{{task_type}}",
                )
            ],
            stack=True,
        ),
        Panel(
            "Tasks waiting for their next attempt",
            [Query("max by (level) (inferq_retry_messages)", "{{level}}")],
            stack=True,
            text="Of all types: they share the retry queues.",
        ),
        Panel(
            "Dead letters",
            [Query(f"max by (task_type) (inferq_dead_letters{{{_TYPES}}})", "{{task_type}}")],
            text="`inferq dead list TYPE` shows them.",
        ),
        Panel("Unroutable messages", [Query("max(inferq_unroutable_messages)", "unroutable")]),
    ),
    Row(
        "Tasks",
        Panel(
            "Tasks submitted per second, over HTTP",
            [
                Query(
                    f"sum by (task_type) (rate(inferq_tasks_submitted_total{{{_TYPES}}}{_RATE}))",
                    "{{task_type}}",
                )
            ],
            unit="reqps",
            stack=True,
        ),
        _ended(_TYPES, "task_type, status"),
        Panel(
            "Failures per second, by code",
            [
                Query(
                    "sum by (task_type, error_code) "
                    f'(rate(inferq_tasks_ended_total{{status="failed",{_TYPES}}}{_RATE}))',
                    "{{task_type}} {{error_code}}",
                )
            ],
            unit="reqps",
            stack=True,
        ),
    ),
    Row(
        "Workers",
        _workers(_TYPES),
        _busy_share(_TYPES),
        _waiting_for(_TYPES),
        Panel(
            "Workers paused, by service",
            [Query("sum by (service) (inferq_worker_paused)", "{{service}}")],
            text="Workers that wait for a service that is unavailable. They keep their tasks.",
        ),
        Panel(
            "Engine processes",
            [
                Query(f"sum(rate(inferq_engine_deaths_total{_RATE}))", "died during a run"),
                Query(
                    f"sum by (reason) (rate(inferq_engine_replacements_total{_RATE}))", "replaced: {{reason}}"
                ),
            ],
            unit="reqps",
        ),
        Panel(
            "Redis is missing",
            [
                Query("sum(inferq_worker_without_redis)", "workers without Redis"),
                Query(f"sum(rate(inferq_status_outages_total{_RATE}))", "status changes lost per second"),
            ],
        ),
        Panel(
            "GPUs: utilisation",
            [
                Query("avg by (instance, gpu) (inferq_gpu_utilization_ratio)", "{{instance}} {{gpu}}"),
                Query(
                    "avg by (instance, gpu, slot) (inferq_gpu_process_utilization_ratio)",
                    "{{instance}} {{gpu}}, slot {{slot}}",
                ),
            ],
            width=12,
            unit="percentunit",
            most=1,
        ),
        Panel(
            "GPUs: memory in use",
            [
                Query(
                    'max by (instance, gpu) (inferq_gpu_memory_bytes{state="used"})', "{{instance}} {{gpu}}"
                ),
                Query(
                    "max by (instance, gpu, slot) (inferq_gpu_process_memory_bytes)",
                    "{{instance}} {{gpu}}, slot {{slot}}",
                ),
            ],
            width=12,
            unit="bytes",
        ),
    ),
    Row(
        "Gateway",
        Panel(
            "HTTP requests per second",
            [Query(f"sum by (status) (rate(inferq_http_requests_total{_NO_PROBES}{_RATE}))", "{{status}}")],
            unit="reqps",
            stack=True,
            text="Without those of probes.",
        ),
        Panel("Seconds until an answer", _shares("inferq_http_request_seconds", _NO_PROBES, ""), unit="s"),
        Panel(
            "Seconds until RabbitMQ confirms a task",
            _shares("inferq_publish_seconds", "", ""),
            unit="s",
        ),
        Panel(
            "Uploads per second",
            [Query(f"sum(rate(inferq_uploaded_bytes_total{_RATE}))", "uploads")],
            width=12,
            unit="Bps",
        ),
        Panel("Open event streams", [Query("sum(inferq_event_streams)", "streams")], width=12),
    ),
    _tenants(_TYPES),
)

_ONE_TYPE = Board(
    "inferq-type",
    "inferq: one type",
    "one",
    Row(
        "Now",
        Panel("Tasks waiting", [Query(f"sum({_READY.format(types=_TYPE)})")], kind="stat", width=4),
        Panel(
            "Longest wait",
            [Query(f"max(inferq_queue_oldest_seconds{{{_TYPE}}})")],
            kind="stat",
            width=4,
            unit="s",
            steps={300: "orange", 1800: "red"},
        ),
        Panel(
            "Workers",
            [Query(f"sum(max by (task_type, state) (inferq_workers{{{_TYPE}}}))")],
            kind="stat",
            width=4,
        ),
        Panel(
            "Median seconds of inference",
            [
                Query(
                    "histogram_quantile(0.5, sum by (le) (rate("
                    f'inferq_worker_stage_seconds_bucket{{stage="inference",{_TYPE}}}[1h])))'
                )
            ],
            kind="stat",
            width=4,
            unit="s",
        ),
        Panel(
            "Failed in the last hour",
            [Query(_failed_share(_TYPE))],
            kind="stat",
            width=4,
            unit="percentunit",
            steps={0.05: "orange", 0.2: "red"},
        ),
        Panel(
            "Dead letters",
            [Query(f"max(inferq_dead_letters{{{_TYPE}}})")],
            kind="stat",
            width=4,
        ),
    ),
    Row(
        "Queues",
        Panel(
            "Messages",
            [Query(f"max by (priority, state) (inferq_queue_messages{{{_TYPE}}})", "{{priority}} {{state}}")],
            stack=True,
            text="ready: waiting. unacked: in the hands of workers.",
        ),
        Panel(
            "Longest wait",
            [Query(f"max by (priority) (inferq_queue_oldest_seconds{{{_TYPE}}})", "{{priority}}")],
            unit="s",
        ),
        Panel(
            "Consumers",
            [Query(f"max by (priority) (inferq_queue_consumers{{{_TYPE}}})", "{{priority}}")],
            text="An idle worker consumes from all its lanes, a busy one from one.",
        ),
    ),
    Row(
        "Tasks",
        _ended(_TYPE, "status"),
        Panel(
            "Failed attempts per second",
            [
                Query(
                    f"sum by (stage, error_code) (rate(inferq_task_failures_total{{{_TYPE}}}{_RATE}))",
                    "{{stage}}: {{error_code}}",
                )
            ],
            unit="reqps",
            stack=True,
            text="Also attempts that are retried.",
        ),
        Panel(
            "Deliveries per second, by outcome",
            [Query(f"sum by (outcome) (rate(inferq_worker_tasks_total{{{_TYPE}}}{_RATE}))", "{{outcome}}")],
            unit="reqps",
            stack=True,
        ),
    ),
    Row(
        "Tracks, if workers have one (INFERQ_TRACK)",
        Panel(
            "Attempts that fail",
            [
                Query(
                    'sum by (track) (rate(inferq_worker_tasks_total{track!="",'
                    f'outcome=~"failed|retried",{_TYPE}}}{_RATE})) '
                    f'/ sum by (track) (rate(inferq_worker_tasks_total{{track!="",'
                    f'outcome=~"succeeded|failed|retried",{_TYPE}}}{_RATE}))',
                    "{{track}}",
                )
            ],
            unit="percentunit",
            text="Of all attempts of the track, also those that are retried.",
        ),
        Panel(
            "Attempts per second",
            [
                Query(
                    f'sum by (track) (rate(inferq_worker_tasks_total{{track!="",{_TYPE}}}{_RATE}))',
                    "{{track}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            "Engine seconds, median",
            [
                Query(
                    "histogram_quantile(0.5, sum by (track, le) (rate("
                    f'inferq_worker_stage_seconds_bucket{{track!="",stage="inference",{_TYPE}}}{_RATE})))',
                    "{{track}}",
                )
            ],
            unit="s",
        ),
    ),
    Row(
        "Seconds per task that succeeded",
        *(
            Panel(
                stage,
                _shares("inferq_worker_stage_seconds", f'{{stage="{stage}",{_TYPE}}}', ""),
                unit="s",
                width=6,
            )
            for stage in ("queued", "fetch", "inference", "upload")
        ),
    ),
    Row(
        "Engines",
        _workers(_TYPE),
        _busy_share(_TYPE),
        _waiting_for(_TYPE),
        Panel(
            "Result cache: share of hits",
            [
                Query(
                    f'(sum(rate(inferq_cache_requests_total{{outcome="hit",{_TYPE}}}{_RATE})) or vector(0))'
                    f' / sum(rate(inferq_cache_requests_total{{outcome!="waited",{_TYPE}}}{_RATE}))',
                    "hits",
                )
            ],
            width=12,
            unit="percentunit",
            most=1,
        ),
        Panel(
            "Runs outside the rule, per second",
            [
                Query(f"sum(rate(inferq_worker_repeated_runs_total{{{_TYPE}}}{_RATE}))", "repeated"),
                Query(f"sum(rate(inferq_worker_unleased_runs_total{{{_TYPE}}}{_RATE}))", "without a lease"),
            ],
            width=12,
            unit="reqps",
            text="Repeated: another run of the task had succeeded. Without a lease: Redis was unavailable.",
        ),
    ),
    _tenants(_TYPE),
)

_OPEN = '{state!~"completed|failed|cancelled"}'
_LATE = "max by (schedule) (inferq_night_late_seconds)"

_BATCHES = Board(
    "inferq-batches",
    "inferq: batches and nights",
    "all",
    Row(
        "Now",
        Panel(
            "Batches in progress",
            [Query(f"sum(max by (state) (inferq_batches{_OPEN}))")],
            kind="stat",
            width=5,
        ),
        Panel(
            "Batches failed in the last day",
            [Query('max(inferq_batches{state="failed"})')],
            kind="stat",
            width=5,
            steps={1: "orange"},
        ),
        Panel(
            "Nightly runs in progress",
            [Query(f"sum(max by (state) (inferq_nights{_OPEN}))")],
            kind="stat",
            width=5,
        ),
        Panel(
            "Nightly runs failed",
            [Query('max(inferq_nights{state="failed"})')],
            kind="stat",
            width=5,
            steps={1: "orange"},
            text="The last run of each schedule counts.",
        ),
        Panel(
            "Latest night",
            [Query(f"max({_LATE})")],
            kind="stat",
            width=4,
            unit="s",
            steps={60: "orange", 900: "red"},
            text="By how much the latest nightly run is late.",
        ),
    ),
    Row(
        "Batches",
        Panel("Batches by state", [Query("max by (state) (inferq_batches)", "{{state}}")], stack=True),
        Panel(
            "Tasks with low priority waiting",
            [
                Query(
                    f'max by (task_type) (inferq_queue_messages{{state="ready",priority="low",{_TYPES}}})',
                    "{{task_type}}",
                )
            ],
            stack=True,
            text="Nightly runs use this priority by default; batches use normal.",
        ),
        _ended(_TYPES, "task_type, status"),
    ),
    Row(
        "Nights",
        Panel("Nightly runs by state", [Query("max by (state) (inferq_nights)", "{{state}}")], stack=True),
        Panel("Late by", [Query(_LATE, "{{schedule}}")], unit="s", text="Seconds beyond the scheduled time."),
        Panel(
            "Time since the last run",
            [
                Query(
                    "time() - max by (schedule) (inferq_beat_last_run_timestamp_seconds)",
                    "{{schedule}}",
                )
            ],
            unit="s",
        ),
        Panel(
            "Starts in the last hour, by outcome",
            [
                Query(
                    "sum by (schedule, outcome) (increase(inferq_beat_runs_total[1h]))",
                    "{{schedule}} {{outcome}}",
                )
            ],
            width=24,
        ),
    ),
)

_CALLBACKS = Board(
    "inferq-callbacks",
    "inferq: callbacks",
    None,
    Row(
        "Now",
        Panel("Waiting", [Query("max(inferq_callbacks_waiting)")], kind="stat", width=6),
        Panel("In flight", [Query("sum(inferq_callbacks_in_flight)")], kind="stat", width=6),
        Panel(
            "Given up",
            [Query("max(inferq_callbacks_given_up)")],
            kind="stat",
            width=6,
            steps={1: "orange"},
            text="`inferq callback list` shows them, `inferq callback resend ID` sends them again.",
        ),
        Panel(
            "Attempts that delivered, in the last hour",
            [
                Query(
                    '(sum(increase(inferq_callbacks_total{outcome="delivered"}[1h])) or vector(0))'
                    " / (sum(increase(inferq_callbacks_total[1h])) > 0)"
                )
            ],
            kind="stat",
            width=6,
            unit="percentunit",
        ),
    ),
    Row(
        "Attempts",
        Panel(
            "Attempts per second, by outcome",
            [Query(f"sum by (outcome) (rate(inferq_callbacks_total{_RATE}))", "{{outcome}}")],
            unit="reqps",
            stack=True,
            text="again: another attempt follows. failed: given up.",
        ),
        Panel("Seconds of an attempt", _shares("inferq_callback_seconds", "", ""), unit="s"),
        Panel("In flight", [Query("sum by (instance) (inferq_callbacks_in_flight)", "{{instance}}")]),
        Panel("Waiting", [Query("max(inferq_callbacks_waiting)", "waiting")]),
        Panel("Given up", [Query("max(inferq_callbacks_given_up)", "given up")]),
        Panel(
            "Deferred per second",
            [Query(f"sum(rate(inferq_callbacks_deferred_total{_RATE}))", "deferred")],
            unit="reqps",
            text="Put off because their target is slow, or at its limit.",
        ),
    ),
)

BOARDS = {"overview": _OVERVIEW, "task-type": _ONE_TYPE, "batches": _BATCHES, "callbacks": _CALLBACKS}
"""By the names of their files."""
