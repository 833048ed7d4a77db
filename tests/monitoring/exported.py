"""Compares the metrics that boards and rules use with those that parts export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from inferq.consumers.monitor.metrics import StatsCollector
from inferq.schemas.monitor import LateNight, QueueFigures, Stats, TypeWorkers
from tests.monitoring.content import expressions
from tests.probes.registries import PARTS, exported

OF_OTHERS = {"ALERTS", "keda_scaler_detail_errors_total", "keda_scaled_object_errors_total"}
_OF_PROMETHEUS = {"instance", "le"}
"""Labels that Prometheus adds, or that each histogram has."""
_OF_HISTOGRAMS = ("_bucket", "_count", "_sum")

_STATS = Stats(
    at=datetime(2026, 11, 30, tzinfo=UTC),
    services={"rabbitmq": True},
    alarms=(),
    queues=(
        QueueFigures(task_type="echo", priority="high", ready=1, unacked=1, consumers=1, oldest_seconds=1),
    ),
    retry_messages={"5s": 1},
    dead_letters={"echo": 1},
    unroutable_messages=1,
    callbacks_waiting=1,
    callbacks_given_up=1,
    batches={"running": 1},
    nights={"running": 1},
    late_nights=(LateNight(schedule="nightly", tenant="default", seconds=1),),
    workers=(TypeWorkers(task_type="echo", idle=1),),
)
"""All figures are known."""


def used() -> dict[str, frozenset[str]]:
    """The metrics of boards and rules, with all labels that any expression needs of each."""
    found: dict[str, frozenset[str]] = {}
    for expression in expressions():
        for use in expression.uses():
            name = _family(use.metric)
            found[name] = found.get(name, frozenset()) | use.labels - _OF_PROMETHEUS
    return found


def declared() -> dict[str, frozenset[str]]:
    """The metrics that the code of all parts declares. Those of GPUs need a driver, or a stand-in."""
    registries = {name: part() for name, part in PARTS.items()}
    registries["monitor"] = CollectorRegistry()
    registries["monitor"].register(StatsCollector(lambda: _STATS, lambda: 1.0))
    return {name: labels for each in registries.values() for name, labels in exported(each).items()}


def served(pages: Iterable[str]) -> dict[str, frozenset[str] | None]:
    """The metrics of such pages, with the labels of their samples; None where there is no sample yet."""
    found: dict[str, frozenset[str] | None] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = frozenset(label for sample in family.samples for label in sample.labels)
            found[name] = labels if family.samples else found.get(name)
    return found


def lacking(there: Mapping[str, frozenset[str] | None]) -> dict[str, str]:
    """What boards and rules use and `there` lacks, by metric. Metrics of other programs are left out."""
    faults = {}
    for name, labels in used().items():
        if name in OF_OTHERS:
            continue
        if name not in there:
            faults[name] = "missing"
        elif (known := there[name]) is not None and not labels <= known:
            faults[name] = f"no label {', '.join(sorted(labels - known))}"
    return faults


def _family(metric: str) -> str:
    for ending in _OF_HISTOGRAMS:
        metric = metric.removesuffix(ending)
    return metric
