"""Puts the figures of all services together. What is unknown is None, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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
from inferq.consumers.monitor.source import NotRead, Unknown
from inferq.schemas import PRIORITIES, BatchState
from inferq.schemas.monitor import Lane, QueueFigures, Stats, TypeWorkers
from inferq.storage.workers import Registered

T = TypeVar("T")

_NO_SUCH_QUEUE = "RabbitMQ has no such queue; run: inferq topology apply"


def make_stats(
    *,
    at: datetime,
    task_types: Iterable[str],
    broker: BrokerFigures | Unknown,
    workers: Registered | Unknown,
    given_up: int | Unknown,
    records: RecordFigures | Unknown,
    oldest: Mapping[Lane, float],
) -> Stats:
    """The stats of one round. `oldest`: seconds that the first message of each lane has been seen waiting."""
    types = tuple(task_types)
    unknown: dict[str, str] = {}

    def known(name: str, value: T | Unknown | None, reason: str = "") -> T | None:
        if isinstance(value, Unknown) or value is None:
            unknown[name] = str(value) if value is not None else reason
            return None
        return value

    queues = broker if isinstance(broker, Unknown) else broker.queues
    fields: dict[str, Any] = {
        "queues": known("queues", _lanes(types, queues, workers, oldest)),
        "workers": known("workers", _by_type(types, workers)),
        "callbacks_given_up": known("callbacks_given_up", given_up),
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
    read = {"rabbitmq": broker, "redis": workers, "store": records}
    services = {
        name: not isinstance(told, Unknown) for name, told in read.items() if not isinstance(told, NotRead)
    }
    return Stats(at=at, services=services, unknown=unknown, **fields)


def _lanes(
    types: Iterable[str],
    queues: Mapping[str, QueueCount] | Unknown,
    workers: Registered | Unknown,
    oldest: Mapping[Lane, float],
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
                    unacked=None if isinstance(workers, Unknown) else in_hand[lane],
                    taken=None if isinstance(workers, Unknown) else workers.taken_of(task_type, priority),
                    oldest_seconds=oldest.get(lane),
                )
            )
    return tuple(found)


def _by_type(types: Iterable[str], workers: Registered | Unknown) -> tuple[TypeWorkers, ...] | Unknown:
    """How many workers of each type are in which state, also of types without workers."""
    if isinstance(workers, Unknown):
        return workers
    states: dict[str, Counter[str]] = {name: Counter() for name in types}
    for worker in workers.workers:
        states.setdefault(worker.task_type, Counter())[worker.state] += 1
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
