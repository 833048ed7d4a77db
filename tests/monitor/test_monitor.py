"""The monitor with a real RabbitMQ and Redis: what it counts, what it leaves alone, and what it calls unknown."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pika
import pytest
from prometheus_client import generate_latest

from inferq.broker import BrokerSettings, BrokerUnavailable
from inferq.consumers.monitor.broker_figures import BrokerReader
from inferq.consumers.monitor.monitor import Monitor
from inferq.schemas import CallbackRecord
from inferq.schemas.monitor import QueueFigures, Stats, TypeWorkers, WorkerInfo
from inferq.storage import CallbackRecords, StatusIndex, open_store
from inferq.storage.figures import MonitorFigures
from inferq.storage.settings import StorageSettings
from inferq.storage.status.usage import usage_key
from inferq.storage.workers import WorkerRegistry
from tests.broker.conftest import set_memory_alarm
from tests.conftest import RabbitMQ
from tests.monitor.conftest import NOBODY
from tests.proxy import TcpProxy
from tests.waiting import eventually

_DURABLE = pika.BasicProperties(delivery_mode=2)


def publish(channel: Any, exchange: str, key: str, count: int = 1) -> None:
    for number in range(count):
        channel.basic_publish(exchange, key, str(number).encode(), _DURABLE)


def after_round(monitor: Monitor) -> Stats:
    """The figures of a round that has those of every service."""

    def look() -> Stats | None:
        monitor.round()
        stats = monitor.stats
        return stats if stats is not None and not stats.unknown else None

    return eventually(look)


def lane(stats: Stats, priority: str) -> QueueFigures:
    assert stats.queues is not None
    return next(q for q in stats.queues if (q.task_type, q.priority) == ("echo", priority))


def metrics_of(monitor: Monitor) -> dict[str, float]:
    lines = generate_latest(monitor.registry).decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def worker(worker_id: str = "w-1", **fields: Any) -> WorkerInfo:
    about = {
        "name": "w", "host": "h", "pid": 1, "task_type": "echo", "lanes": ("high", "normal", "low"),
        "state": "busy", "slots": 1, "busy": 1, "version": "0", "since": datetime.now(UTC),
    }  # fmt: skip
    return WorkerInfo.model_validate({"worker_id": worker_id, **about, **fields})


def test_every_queue_is_counted_and_no_message_is_touched(
    channel: Any, make_monitor: Callable[..., Monitor], index: StatusIndex
) -> None:
    publish(channel, "inference.tasks", "task_type.echo", 3)
    publish(channel, "inference.tasks", "task_type.echo.high")
    publish(channel, "inference.tasks", "nonsense", 2)
    publish(channel, "inference.dead", "task_type.echo", 4)
    publish(channel, "inference.retry.3600s", "task_type.echo", 5)
    publish(channel, "inference.jobs", "inference.callbacks", 6)
    publish(channel, "celery_delayed_27", ".".join("1" * 28) + ".inference.callbacks", 1)
    WorkerRegistry(index).beat(worker(in_hand={"normal": 2}), {("echo", "normal"): 7})
    used = {"t:echo:succeeded": 3, "t:echo:failed": 1, "t:echo:retried": 5, "t:echo:us": 8_000_000}
    index.write(lambda redis: redis.hset(usage_key(datetime.now(UTC).date()), mapping=used))
    monitor = make_monitor()
    # Another type's queues do not exist: they are absent, and the others are counted all the same.
    stats = after_round(monitor)
    assert (lane(stats, "normal").ready, lane(stats, "high").ready, lane(stats, "low").ready) == (3, 1, 0)
    assert (lane(stats, "normal").unacked, lane(stats, "high").unacked) == (2, 0)
    assert lane(stats, "normal").taken == 7
    assert (lane(stats, "normal").oldest_seconds, lane(stats, "low").oldest_seconds) == (0.0, 0.0)
    assert stats.dead_letters == {"echo": 4}
    assert stats.retry_messages is not None
    assert (stats.retry_messages["3600s"], stats.retry_messages["5s"]) == (5, 0)
    assert (stats.unroutable_messages, stats.callbacks_waiting, stats.alarms) == (2, 7, ())
    assert stats.services == {"rabbitmq": True, "redis": True, "store": True}
    assert (stats.task_seconds, stats.unfed_tasks) == ({"echo": 2.0}, {})
    assert TypeWorkers(task_type="echo", busy=1, slots=1, with_tasks=1) in (stats.workers or ())
    metrics = metrics_of(monitor)
    assert metrics['inferq_queue_messages{priority="normal",state="ready",task_type="echo"}'] == 3
    assert metrics['inferq_queue_messages{priority="normal",state="unacked",task_type="echo"}'] == 2
    assert metrics['inferq_workers{state="busy",task_type="echo"}'] == 1
    assert metrics['inferq_workers{state="idle",task_type="ocr"}'] == 0
    assert metrics['inferq_dead_letters{task_type="echo"}'] == 4
    assert not [name for name in metrics if 'priority="normal",state="ready",task_type="ocr"' in name]
    # A look must not count as a delivery: workers and the delivery limit would take it for one.
    method, properties, _ = channel.basic_get("inference.echo.normal", auto_ack=True)
    assert not method.redelivered
    assert not properties.headers.get("x-delivery-count")
    assert MonitorFigures(index).load() == stats


def test_the_first_message_grows_old_until_a_worker_takes_it(
    channel: Any, make_monitor: Callable[..., Monitor], index: StatusIndex
) -> None:
    registry = WorkerRegistry(index)
    monitor = make_monitor()
    after_round(monitor)
    publish(channel, "inference.tasks", "task_type.echo", 2)

    def oldest(monitor: Monitor) -> float:
        return lane(after_round(monitor), "normal").oldest_seconds or 0.0

    waited = eventually(lambda: (age := oldest(monitor)) >= 1 and age)
    successor = make_monitor()
    assert oldest(successor) >= waited, "the next monitor goes on where the last one ended"
    for count in (1, 2):
        channel.basic_get("inference.echo.normal", auto_ack=True)
        registry.beat(worker(), {("echo", "normal"): 1})
        assert (oldest(successor) > 0) == (count == 1)


def test_without_redis_nothing_of_it_is_called_zero(
    channel: Any, make_monitor: Callable[..., Monitor]
) -> None:
    publish(channel, "inference.tasks", "task_type.echo", 3)
    monitor = make_monitor(redis_url=f"redis://{NOBODY}/0")
    eventually(lambda: (monitor.round(), monitor.stats and monitor.stats.services.get("store"))[1])  # type: ignore[index]
    stats = monitor.stats
    assert stats is not None
    normal = lane(stats, "normal")
    assert normal.ready == 3
    assert (normal.unacked, normal.oldest_seconds, normal.taken) == (None, None, None)
    assert (stats.workers, stats.callbacks_given_up, stats.batches, stats.nights) == (None,) * 4
    assert (stats.task_seconds, stats.unfed_tasks) == (None, None)
    unknown = {"workers", "callbacks_given_up", "batches", "nights", "task_seconds", "unfed_tasks"}
    assert set(stats.unknown) == unknown
    assert "127.0.0.1" not in str(stats.unknown), "tenants read the reasons"
    metrics = metrics_of(monitor)
    assert metrics['inferq_service_up{service="redis"}'] == 0
    assert metrics['inferq_service_up{service="rabbitmq"}'] == 1
    names = {name.partition("{")[0] for name in metrics}
    absent = {"inferq_workers", "inferq_queue_oldest_seconds", "inferq_callbacks_given_up", "inferq_batches"}
    assert not names & absent
    assert not [name for name in metrics if "unacked" in name]
    assert not monitor.readiness().ready


def test_without_rabbitmq_its_figures_are_absent(
    make_monitor: Callable[..., Monitor], index: StatusIndex
) -> None:
    WorkerRegistry(index).beat(worker(in_hand={"normal": 1}), {})
    monitor = make_monitor(amqp_url=f"amqp://{NOBODY}/")
    monitor.round()
    stats = monitor.stats
    assert stats is not None
    assert stats.services is not None
    assert not stats.services["rabbitmq"]
    assert (lane(stats, "normal").ready, lane(stats, "normal").unacked) == (None, 1)
    fields = ("retry_messages", "dead_letters", "unroutable_messages", "callbacks_waiting", "alarms")
    assert {name: stats.unknown.get(name) for name in fields} == dict.fromkeys(
        fields, "RabbitMQ is unavailable"
    )
    metrics = metrics_of(monitor)
    assert not [name for name in metrics if "ready" in name or "alarm" in name or "last_success" in name]


def test_an_alarm_is_told_by_its_kind_while_the_queues_are_read_on(
    channel: Any, monitored_amqp_url: str, shared_rabbitmq: RabbitMQ
) -> None:
    reader = BrokerReader(BrokerSettings(amqp_url=monitored_amqp_url))
    assert reader.read(["echo"]).alarms == ()
    try:
        set_memory_alarm(shared_rabbitmq, raised=True)
        figures = eventually(lambda: (found := reader.read(["echo"])).alarms and found)
    finally:
        set_memory_alarm(shared_rabbitmq, raised=False)
    assert figures.alarms == ("memory",)
    assert figures.queues["inference.echo.normal"].ready == 0
    eventually(lambda: reader.read(["echo"]).alarms == ())
    reader.close()


def test_a_connection_that_died_between_two_readings_is_made_again(
    channel: Any, monitored_amqp_url: str, proxied: Callable[[str], tuple[str, TcpProxy]]
) -> None:
    url, proxy = proxied(monitored_amqp_url)
    reader = BrokerReader(BrokerSettings(amqp_url=url))
    for _ in range(3):
        assert reader.read(["echo"]).queues["inference.echo.low"].ready == 0
        proxy.cut()
    proxy.refuse()
    with pytest.raises(BrokerUnavailable):
        reader.read(["echo"])
    proxy.refuse(False)
    assert reader.read(["echo"]).alarms == ()
    reader.close()


def test_callbacks_given_up_are_counted_over_all_tenants_until_they_are_delivered(
    make_monitor: Callable[..., Monitor], channel: Any, index: StatusIndex, tmp_path: Any
) -> None:
    records = CallbackRecords(open_store(StorageSettings(store_url=(tmp_path / "store").as_uri())), index)

    def note(tenant: str, state: str) -> None:
        now = datetime.now(UTC)
        about = {
            "callback_id": f"msg_{tenant}", "tenant": tenant, "subject_kind": "task", "subject_id": "t",
            "event": "task.succeeded", "url": "https://a.example/", "state": state, "created_at": now,
            "updated_at": now,
        }  # fmt: skip
        records.note(CallbackRecord.model_validate(about))

    note("a", "failed")
    note("b", "failed")
    monitor = make_monitor()
    assert after_round(monitor).callbacks_given_up == 2
    note("a", "delivered")
    assert after_round(monitor).callbacks_given_up == 1
