"""Puts the figures of all services together. What is unknown is None, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar, get_args

from inferq.broker import RETRY_LEVELS, dead_queue, work_queue
from inferq.broker.topology import UNROUTABLE, retry_exchange
from inferq.consumers.monitor.broker_figures import (
    CALLBACKS_QUEUE,
    DELAY_QUEUES,
    BrokerFigures,
    QueueCount,
)
from inferq.consumers.monitor.records import RecordFigures
from inferq.consumers.monitor.source import Unknown
from inferq.schemas import PRIORITIES, BatchState
from inferq.schemas.monitor import Lane, QueueFigures, Service, Stats, TypeWorkers
from inferq.storage.workers import Registered

T = TypeVar("T")

_MOST_NAMED = 5
_NO_SUCH_QUEUE = "RabbitMQ has no such queue; run: inferq topology apply"


def make_stats(
    *,
    at: datetime,
    task_types: Iterable[str],
    broker: BrokerFigures | Unknown,
    workers: Registered | Unknown,
    given_up: int | Unknown,
    task_seconds: Mapping[str, float] | Unknown,
    records: RecordFigures | Unknown,
    oldest: Mapping[Lane, float],
    read_at: Mapping[Service, datetime],
) -> Stats:
    """The stats of one round. `oldest`: seconds that the first message of each lane has been seen waiting."""
    types = tuple(task_types)
    unknown: dict[str, str] = {}

    def known(name: str, value: T | Unknown | None, reason: str = "") -> T | None:
        if isinstance(value, Unknown) or value is None:
            unknown[name] = value.reason if value is not None else reason
            return None
        return value

    queues = broker if isinstance(broker, Unknown) else broker.queues
    unexplained = _unexplained(types, queues, workers)
    fields: dict[str, Any] = {
        "queues": known("queues", _lanes(types, queues, workers, oldest, unexplained)),
        "workers": known("workers", _by_type(types, workers)),
        "callbacks_given_up": known("callbacks_given_up", given_up),
        "task_seconds": known("task_seconds", task_seconds),
        "alarms": known(
            "alarms",
            broker if isinstance(broker, Unknown) else broker.alarms,
            "this RabbitMQ user may not publish to amq.headers; grant the rights in docs/rights.md",
        ),
    }
    if isinstance(queues, Unknown):
        for name in ("retry_messages", "dead_letters", "unroutable_messages", "callbacks_waiting"):
            fields[name] = known(name, queues)
    else:
        fields["retry_messages"] = {
            f"{seconds}s": count.ready
            for seconds in RETRY_LEVELS
            if (count := queues.get(retry_exchange(seconds))) is not None
        }
        fields["dead_letters"] = {
            name: count.ready for name in types if (count := queues.get(dead_queue(name))) is not None
        }
        fields["unroutable_messages"] = known(
            "unroutable_messages", _ready(queues, UNROUTABLE), _NO_SUCH_QUEUE
        )
        fields["callbacks_waiting"] = known("callbacks_waiting", _callbacks(queues), _NO_SUCH_QUEUE)
    for name in ("batches", "nights", "late_nights"):
        reason = "Redis is unavailable"
        if not isinstance(records, Unknown) and records.redis:
            reason = "the batches are being read for the first time"
        value = records if isinstance(records, Unknown) else getattr(records, name)
        fields[name] = known(name, _with_zeros(value) if isinstance(value, Counter) else value, reason)
    fields["unfed_tasks"] = known(
        "unfed_tasks",
        records if isinstance(records, Unknown) else records.unfed,
        "Redis is unavailable, or a batch's lines are being counted",
    )
    if unexplained:
        names = ", ".join(f"{task_type} {priority}" for task_type, priority in unexplained[:_MOST_NAMED])
        more = " and others" if len(unexplained) > _MOST_NAMED else ""
        for name in ("unacked", "oldest_seconds"):
            unknown[name] = f"consumers without a heartbeat in Redis take tasks: {names}{more}"
    read: dict[Service, object] = {"rabbitmq": broker, "redis": workers, "store": records}
    # A service that was not read yet, or is slow, is neither up nor down.
    services = {
        name: not isinstance(found, Unknown)
        for name, found in read.items()
        if not isinstance(found, Unknown) or found.outage
    }
    return Stats(at=at, services=services, read_at=dict(read_at), unknown=unknown, **fields)


def _lanes(
    types: Iterable[str],
    queues: Mapping[str, QueueCount] | Unknown,
    workers: Registered | Unknown,
    oldest: Mapping[Lane, float],
    unexplained: Collection[Lane],
) -> tuple[QueueFigures, ...] | Unknown:
    """Every lane of which something is known."""
    if isinstance(queues, Unknown) and isinstance(workers, Unknown):
        return queues
    in_hand = Counter[Lane]()
    if not isinstance(workers, Unknown):
        for worker in workers.workers:
            for priority, number in worker.in_hand.items():
                in_hand[worker.task_type, priority] += number
    found = []
    for task_type in types:
        for priority in PRIORITIES:
            lane = task_type, priority
            count = None if isinstance(queues, Unknown) else queues.get(work_queue(task_type, priority))
            found.append(
                QueueFigures(
                    task_type=task_type,
                    priority=priority,
                    ready=None if count is None else count.ready,
                    consumers=None if count is None else count.consumers,
                    unacked=None if isinstance(workers, Unknown) or lane in unexplained else in_hand[lane],
                    taken=None if isinstance(workers, Unknown) else workers.taken_of(task_type, priority),
                    oldest_seconds=None if lane in unexplained else oldest.get(lane),
                )
            )
    return tuple(found)


def _unexplained(
    types: Iterable[str], queues: Mapping[str, QueueCount] | Unknown, workers: Registered | Unknown
) -> list[Lane]:
    """Lanes with more consumers than the registered workers may have."""
    if isinstance(queues, Unknown) or isinstance(workers, Unknown):
        return []
    return [
        (task_type, priority)
        for task_type in types
        for priority in PRIORITIES
        if (count := queues.get(work_queue(task_type, priority))) is not None
        and not workers.explain(count.consumers, task_type, priority)
    ]


def _by_type(types: Iterable[str], workers: Registered | Unknown) -> tuple[TypeWorkers, ...] | Unknown:
    """How many workers of each type are in which state, also of types without workers."""
    if isinstance(workers, Unknown):
        return workers
    states: dict[str, Counter[str]] = {name: Counter() for name in types}
    for worker in workers.workers:
        counts = states.setdefault(worker.task_type, Counter())
        counts[worker.state] += 1
        counts["slots"] += worker.slots
        counts["with_tasks"] += worker.busy > 0
    return tuple(TypeWorkers(task_type=name, **counts) for name, counts in states.items())


def _ready(queues: Mapping[str, QueueCount], name: str) -> int | None:
    count = queues.get(name)
    return None if count is None else count.ready


def _callbacks(queues: Mapping[str, QueueCount]) -> int | None:
    """Callbacks that wait for their first or next attempt, with the few delayed jobs of batches."""
    counts = [_ready(queues, name) for name in (CALLBACKS_QUEUE, *DELAY_QUEUES)]
    return None if None in counts else sum(count or 0 for count in counts)


def _with_zeros(counts: Counter[BatchState]) -> dict[BatchState, int]:
    return {state: counts[state] for state in get_args(BatchState)}
