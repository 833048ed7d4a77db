"""The consumer, against a real RabbitMQ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pika
import pytest

from inferq.broker import (
    BrokerSettings,
    Consumer,
    Delivery,
    Publisher,
    connect,
    task_message,
    topology_for,
    work_queue,
)
from inferq.broker.lanes import LEAST_PRIORITY
from inferq.schemas import Priority, parse_task
from tests.broker.conftest import too_deep
from tests.conftest import RabbitMQ
from tests.proxy import TcpProxy
from tests.waiting import eventually

LANES: tuple[Priority, ...] = ("high", "normal", "low")
TOPOLOGY = topology_for(["echo"])


@pytest.fixture
def settings(fresh_amqp_url: str) -> BrokerSettings:
    return BrokerSettings(amqp_url=fresh_amqp_url)


@pytest.fixture
def submit(settings: BrokerSettings) -> Iterator[Callable[..., None]]:
    publisher = Publisher(settings, name="test", topology=TOPOLOGY)
    publisher.start()

    def publish(task_id: str, priority: Priority = "normal") -> None:
        task = parse_task({"task_id": task_id, "task_type": "echo", "priority": priority})
        publisher.publish(task_message(task)).result(60)

    yield publish
    publisher.close()


@pytest.fixture
def consume(settings: BrokerSettings) -> Iterator[Callable[..., Consumer]]:
    consumers = []

    def start(lanes: tuple[Priority, ...] = LANES, url: str | None = None, **order: int) -> Consumer:
        chosen = settings if url is None else settings.model_copy(update={"amqp_url": url})
        queues = [work_queue("echo", lane) for lane in lanes]
        consumer = Consumer(chosen, queues, name="test", topology=TOPOLOGY, **order)
        consumer.start()
        consumer.wait_connected(10)
        consumers.append(consumer)
        return consumer

    yield start
    for consumer in consumers:
        consumer.close()


def take(consumer: Consumer, timeout: float = 10) -> Delivery:
    delivery = consumer.next(timeout)
    assert delivery is not None, "nothing was delivered"
    return delivery


def waiting(settings: BrokerSettings) -> int:
    """How many messages are ready in the lanes: neither delivered nor gone."""
    connection = connect(settings, name="test")
    channel = connection.channel()
    count = sum(
        channel.queue_declare(work_queue("echo", lane), passive=True).method.message_count for lane in LANES
    )
    connection.close()
    return count


@pytest.mark.parametrize("lanes", [LANES, ("normal",)])
def test_it_is_idle_while_it_is_subscribed_to_all_lanes_and_has_no_delivery(
    consume: Callable[..., Consumer], submit: Callable[..., None], lanes: tuple[Priority, ...]
) -> None:
    consumer = consume(lanes)
    assert consumer.idle_seconds is None, "nobody has asked for a delivery"
    eventually(lambda: consumer.next(0.01) or consumer.idle_seconds)
    submit("a")
    first = take(consumer)
    assert consumer.idle_seconds is None
    consumer.ack(first)
    eventually(lambda: consumer.next(0.01) or consumer.idle_seconds)
    consumer.pause()
    eventually(lambda: consumer.idle_seconds is None, "paused, it can take no task that waits")
    eventually(lambda: consumer.next(0.01) or consumer.idle_seconds)


def test_it_is_not_idle_without_a_connection(
    consume: Callable[..., Consumer],
    settings: BrokerSettings,
    proxied: Callable[[str], tuple[str, TcpProxy]],
) -> None:
    url, proxy = proxied(settings.amqp_url)
    consumer = consume(url=url)
    eventually(lambda: consumer.next(0.01) or consumer.idle_seconds)
    proxy.refuse()
    proxy.cut()
    eventually(lambda: consumer.next(0.01) or consumer.idle_seconds is None)


@pytest.mark.parametrize("lanes", [("normal",), LANES])
def test_one_delivery_at_a_time_in_order(
    submit: Callable[..., None],
    consume: Callable[..., Consumer],
    lanes: tuple[Priority, ...],
    settings: BrokerSettings,
) -> None:
    for n in range(20):
        submit(f"t{n}")
    consumer = consume(lanes)
    seen = []
    for left in range(19, -1, -1):
        delivery = take(consumer)
        assert consumer.next(0.02) is None
        eventually(lambda left=left: waiting(settings) == left)
        seen.append(delivery.message_id)
        consumer.ack(delivery)
    assert seen == [f"t{n}" for n in range(20)]
    eventually(lambda: waiting(settings) == 0)


def test_lanes_are_served_from_the_most_urgent_down(
    submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    for n in range(5):
        for lane in reversed(LANES):
            submit(f"{lane}{n}", lane)
    consumer = consume()
    seen = []
    for _ in range(15):
        delivery = take(consumer)
        seen.append(str(delivery.message_id))
        consumer.ack(delivery)
    assert seen == [f"{lane}{n}" for lane in LANES for n in range(5)]


def test_an_urgent_task_overtakes_a_backlog(
    submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    for n in range(50):
        submit(f"low{n}", "low")
    consumer = consume()
    for n in range(10):
        delivery = take(consumer)
        submit(f"high{n}", "high")
        consumer.ack(delivery)
        urgent = take(consumer)
        assert urgent.message_id == f"high{n}"
        consumer.ack(urgent)


def test_an_urgent_task_that_was_sent_to_a_lane_being_cancelled_comes_next(
    submit: Callable[..., None],
    consume: Callable[..., Consumer],
    settings: BrokerSettings,
    proxied: Callable[[str], tuple[str, TcpProxy]],
) -> None:
    url, proxy = proxied(settings.amqp_url)
    consumer = consume(url=url)
    for n in range(5):
        assert consumer.next(0.1) is None  # subscribed to all lanes
        proxy.hold()
        for m in range(2):
            submit(f"low{n}-{m}", "low")
        first = take(consumer)
        consumer.ack(first)
        submit(f"high{n}", "high")  # RabbitMQ has not read that the lane is cancelled
        proxy.hold(False)
        taken = [str(first.message_id)]
        for _ in range(2):
            delivery = take(consumer)
            taken.append(str(delivery.message_id))
            consumer.ack(delivery)
        assert taken == [f"low{n}-0", f"high{n}", f"low{n}-1"]


def test_a_busy_consumer_leaves_other_lanes_to_an_idle_one(
    submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    busy, idle = consume(), consume()
    submit("low", "low")
    first = None
    while first is None:
        first = busy.next(0.05)
        if first is None and (other := idle.next(0.05)) is not None:
            busy, idle, first = idle, busy, other
    for n in range(10):
        submit(f"high{n}", "high")
        delivery = take(idle, timeout=2)
        assert delivery.message_id == f"high{n}"
        idle.ack(delivery)
    busy.ack(first)


def test_tasks_go_to_the_free_consumer_of_the_highest_priority(
    submit: Callable[..., None], consume: Callable[..., Consumer], settings: BrokerSettings
) -> None:
    ahead = consume(("normal",))
    younger = consume(("normal",), priority=LEAST_PRIORITY)
    older = consume(("normal",), priority=-3)
    connection = connect(settings, name="test")
    channel = connection.channel()

    def consumers() -> int:
        return int(channel.queue_declare(work_queue("echo", "normal"), passive=True).method.consumer_count)

    for count, consumer in enumerate((ahead, younger, older), 1):
        assert consumer.next(0.02, low_priority=consumer is ahead) is None
        eventually(lambda count=count: consumers() == count)
    connection.close()
    for n in range(3):
        submit(f"t{n}")
    assert [take(c).message_id for c in (older, younger, ahead)] == ["t0", "t1", "t2"]


def test_a_consumer_that_is_not_asked_holds_nothing_back(
    submit: Callable[..., None], consume: Callable[..., Consumer], settings: BrokerSettings
) -> None:
    for lanes in (("normal",), LANES):
        lazy, keen = consume(lanes), consume(lanes)
        submit("first")
        delivery = take(lazy)
        lazy.ack(delivery, more=False)
        submit("second")
        assert take(keen).message_id == "second"
        lazy.close()
        keen.close()
        drain = consume()
        drain.ack(take(drain))
        drain.close()
        eventually(lambda: waiting(settings) == 0)


@pytest.mark.parametrize("lanes", [("normal",), LANES])
def test_what_is_given_back_comes_again(
    submit: Callable[..., None], consume: Callable[..., Consumer], lanes: tuple[Priority, ...]
) -> None:
    submit("t1")
    consumer = consume(lanes)
    consumer.requeue(take(consumer))
    again = take(consumer)
    assert again.message_id == "t1"
    assert again.redelivered
    assert again.attempt == 1
    consumer.ack(again)
    assert consumer.next(0.2) is None


@pytest.mark.parametrize("lanes", [("normal",), LANES])
def test_a_cut_connection_redelivers_what_was_in_hand(
    submit: Callable[..., None],
    consume: Callable[..., Consumer],
    settings: BrokerSettings,
    proxied: Callable[[str], tuple[str, TcpProxy]],
    lanes: tuple[Priority, ...],
) -> None:
    url, proxy = proxied(settings.amqp_url)
    consumer = consume(lanes, url)
    for n in range(5):
        submit(f"t{n}")
        lost = take(consumer)
        proxy.cut()
        eventually(lambda: not consumer.connected)
        consumer.ack(lost)  # too late: it must neither raise nor acknowledge another's delivery
        again = take(consumer)
        assert again.message_id == lost.message_id == f"t{n}"
        assert again.epoch > lost.epoch
        consumer.ack(again)
    eventually(lambda: waiting(settings) == 0)


def test_a_task_in_hand_for_longer_than_the_heartbeat_keeps_its_connection(
    settings: BrokerSettings, submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    consumer = consume(("normal",), url=f"{settings.amqp_url}?heartbeat=1")
    for n in range(20):  # at a pace at which the working thread turns the connection's loop itself
        submit(f"quick{n}")
        consumer.ack(take(consumer))
    submit("slow")
    slow = take(consumer)

    time.sleep(4)  # RabbitMQ gives up after two heartbeats

    assert consumer.connected
    consumer.ack(slow)
    submit("next")
    following = take(consumer)
    assert (following.message_id, following.epoch) == ("next", slow.epoch)


def test_a_delivery_that_is_held_too_long_for_the_broker_comes_again(
    impatient_rabbitmq: RabbitMQ, settings: BrokerSettings
) -> None:
    release = impatient_rabbitmq.management.get("/overview").json()["rabbitmq_version"]
    closes_the_channel = tuple(int(number) for number in release.split(".")[:2]) < (4, 3)
    publisher = Publisher(settings, name="test", topology=TOPOLOGY)
    slow, other = (Consumer(settings, [work_queue("echo", "normal")], name="test") for _ in range(2))
    publisher.start()
    slow.start()
    try:
        publisher.publish(task_message(parse_task({"task_id": "t", "task_type": "echo"}))).result(60)
        held = take(slow)
        other.start()
        again = other.next(60 if closes_the_channel else 5)
        if closes_the_channel:
            assert again is not None
            assert again.message_id == "t"
            assert again.redelivered
            other.ack(again)
        else:
            assert again is None
        slow.ack(held)  # too late perhaps: it must neither raise nor acknowledge another's delivery
        assert slow.next(0.5) is None
        assert other.next(0.5) is None
        assert waiting(settings) == 0
    finally:
        for part in (publisher, slow, other):
            part.close()


def test_stopping_while_a_task_is_in_hand_leaves_the_next_one_to_others(
    settings: BrokerSettings, submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    consumer = consume()
    submit("first")
    first = take(consumer)

    consumer.stop()
    submit("second", "high")
    eventually(lambda: waiting(settings) == 1)

    consumer.ack(first, more=True)
    assert consumer.next(0.3) is None
    assert waiting(settings) == 1


@pytest.mark.parametrize("lanes", [("normal",), LANES])
def test_a_deleted_queue_is_declared_and_consumed_anew(
    submit: Callable[..., None],
    consume: Callable[..., Consumer],
    settings: BrokerSettings,
    lanes: tuple[Priority, ...],
) -> None:
    consumer = consume(lanes)
    assert consumer.next(0.1) is None
    connection = connect(settings, name="test")
    connection.channel().queue_delete(work_queue("echo"))
    connection.close()
    eventually(lambda: not consumer.connected or consumer.next(0.01) is not None)
    consumer.wait_connected(10)
    submit("t1")
    delivery = take(consumer)
    assert delivery.message_id == "t1"
    consumer.ack(delivery)


def test_stopping_takes_no_more_and_still_settles(
    submit: Callable[..., None], consume: Callable[..., Consumer], settings: BrokerSettings
) -> None:
    submit("t1")
    submit("t2")
    consumer = consume()
    delivery = take(consumer)
    consumer.stop()
    consumer.ack(delivery)
    assert consumer.next(0.3) is None
    eventually(lambda: waiting(settings) == 1)


@pytest.mark.parametrize("kind", [list, dict])
def test_headers_that_are_nested_too_deeply_leave_the_body(
    submit: Callable[..., None],
    consume: Callable[..., Consumer],
    settings: BrokerSettings,
    kind: type,
) -> None:
    submit("t1")
    connection = connect(settings, name="test")
    properties = pika.BasicProperties(headers={"deep": too_deep(kind)}, message_id="deep", delivery_mode=2)
    connection.channel().basic_publish("", work_queue("echo", "normal"), b"body", properties)
    connection.close()
    submit("t2")
    consumer = consume()
    seen = []
    for _ in range(3):
        delivery = take(consumer)
        seen.append((delivery.message_id, delivery.attempt, delivery.redelivered))
        consumer.ack(delivery)
    assert seen == [("t1", 1, False), ("deep", 1, False), ("t2", 1, False)]
