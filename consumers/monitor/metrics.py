"""The figures for Prometheus. What is unknown is absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from inferq.schemas.monitor import Alarm, Stats, WorkerState

ALL_TYPES = "all"
"""The type of messages at a retry level: RabbitMQ counts those of all types together."""


class StatsCollector(Collector):
    """Gives the figures of the last round, at each scrape. `last_success`: when the queues were last read."""

    def __init__(self, stats: Callable[[], Stats | None], last_success: Callable[[], float | None]) -> None:
        self._stats = stats
        self._last_success = last_success

    def collect(self) -> Iterator[GaugeMetricFamily]:
        moment = self._last_success()
        if moment is not None:
            yield _one(
                "inferq_monitor_last_success_timestamp_seconds", "When the queues were last read.", moment
            )
        stats = self._stats()
        if stats is not None:
            yield from _families(stats)


def _families(stats: Stats) -> Iterator[GaugeMetricFamily]:
    yield _many(
        "inferq_service_up",
        "1 if the service can be used, else 0.",
        ("service",),
        {(name,): float(up) for name, up in (stats.services or {}).items()},
    )
    yield from _of_queues(stats)
    if stats.alarms is not None:
        yield _many(
            "inferq_broker_alarm",
            "1 while RabbitMQ blocks publishers for this reason.",
            ("kind",),
            {(kind,): float(kind in stats.alarms) for kind in get_args(Alarm)},
        )
    yield _many(
        "inferq_retry_messages",
        "Tasks that wait at a retry level, of all types together.",
        ("task_type", "level"),
        {(ALL_TYPES, level): count for level, count in (stats.retry_messages or {}).items()},
    )
    yield _many(
        "inferq_dead_letters", "Dead letters of a task type.", ("task_type",), _labelled(stats.dead_letters)
    )
    if stats.unroutable_messages is not None:
        yield _one(
            "inferq_unroutable_messages", "Messages that no queue was bound for.", stats.unroutable_messages
        )
    if stats.callbacks_waiting is not None:
        yield _one(
            "inferq_callbacks_waiting",
            "Callbacks that wait for an attempt, and delayed jobs of batches.",
            stats.callbacks_waiting,
        )
    if stats.callbacks_given_up is not None:
        yield _one(
            "inferq_callbacks_given_up",
            "Callbacks that were given up and not delivered since.",
            stats.callbacks_given_up,
        )
    yield _many(
        "inferq_batches",
        "Batches that have not ended, and those of the last day that have, by state.",
        ("state",),
        _labelled(stats.batches),
    )
    yield _many(
        "inferq_nights", "The last run of each schedule, by state.", ("state",), _labelled(stats.nights)
    )
    late: dict[tuple[str, ...], float] = {}
    for night in stats.late_nights or ():
        late[night.schedule,] = max(night.seconds, late.get((night.schedule,), 0.0))
    yield _many(
        "inferq_night_late_seconds",
        "Seconds since a run should have started, or since its window closed before its end; 0 if in time.",
        ("schedule",),
        late,
    )
    workers: dict[tuple[str, ...], float] = {
        (by_type.task_type, state): float(getattr(by_type, state))
        for by_type in stats.workers or ()
        for state in get_args(WorkerState)
    }
    yield _many("inferq_workers", "Workers of a task type, by state.", ("task_type", "state"), workers)


def _of_queues(stats: Stats) -> Iterator[GaugeMetricFamily]:
    messages: dict[tuple[str, ...], float] = {}
    oldest: dict[tuple[str, ...], float] = {}
    consumers: dict[tuple[str, ...], float] = {}
    for lane in stats.queues or ():
        labels = lane.task_type, lane.priority
        if lane.ready is not None:
            messages[*labels, "ready"] = lane.ready
        if lane.unacked is not None:
            messages[*labels, "unacked"] = lane.unacked
        if lane.oldest_seconds is not None:
            oldest[labels] = lane.oldest_seconds
        if lane.consumers is not None:
            consumers[labels] = lane.consumers
    names = ("task_type", "priority")
    yield _many(
        "inferq_queue_messages",
        "Messages in a work queue, by state: ready, unacked.",
        (*names, "state"),
        messages,
    )
    yield _many(
        "inferq_queue_oldest_seconds",
        "Seconds for which the first message of a work queue has been seen waiting; 0 without one.",
        names,
        oldest,
    )
    yield _many("inferq_queue_consumers", "Consumers of a work queue.", names, consumers)


def _labelled(counts: Mapping[Any, int] | None) -> dict[tuple[str, ...], float]:
    return {(name,): float(count) for name, count in (counts or {}).items()}


def _one(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _many(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
