"""The publisher, against a real RabbitMQ."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.broker import (
    BrokerSettings,
    BrokerUnavailable,
    Message,
    Publisher,
    PublishRejected,
    Unroutable,
    connect,
    task_message,
    topology_for,
    work_queue,
)
from inferq.schemas import InvalidTask, parse_task
from tests.broker.conftest import set_memory_alarm
from tests.conftest import RabbitMQ
from tests.proxy import TcpProxy
from tests.waiting import eventually

QUEUE = work_queue("echo")


def message(number: int) -> Message:
    return task_message(parse_task({"task_id": f"t{number}", "task_type": "echo", "payload": number}))


def drained(settings: BrokerSettings, count: int) -> Counter[str]:
    """How often each id is in the queue, once there are `count` of them."""
    connection = connect(settings, name="test")
    channel = connection.channel()
    seen: Counter[str] = Counter()

    def enough() -> bool:
        while (got := channel.basic_get(QUEUE, auto_ack=True))[0] is not None:
            seen[str(got[1].message_id)] += 1
        return len(seen) >= count

    eventually(enough, f"{count} tasks in the queue")
    connection.close()
    return seen


@pytest.fixture
def settings(fresh_amqp_url: str) -> BrokerSettings:
    return BrokerSettings(amqp_url=fresh_amqp_url, publish_timeout=10)


@pytest.fixture
def publisher(settings: BrokerSettings) -> Iterator[Publisher]:
    publisher = Publisher(settings, name="test", topology=topology_for(["echo"]))
    publisher.start()
    publisher.wait_connected(10)
    yield publisher
    publisher.close()


def test_every_message_of_many_threads_is_confirmed_and_queued_once(
    publisher: Publisher, settings: BrokerSettings
) -> None:
    with ThreadPoolExecutor(8) as threads:
        futures = list(threads.map(lambda n: publisher.publish(message(n)), range(2000)))
    for future in futures:
        future.result(60)
    seen = drained(settings, 2000)
    assert len(seen) == 2000
    assert set(seen.values()) == {1}


async def test_asyncio_tasks_can_publish_beyond_the_window(settings: BrokerSettings) -> None:
    narrow = settings.model_copy(update={"publish_window": 3})
    publisher = Publisher(narrow, name="test", topology=topology_for(["echo"]))
    publisher.start()
    try:
        await asyncio.gather(*(publisher.confirm(message(n)) for n in range(100)))
    finally:
        await asyncio.to_thread(publisher.close)
    assert len(drained(settings, 100)) == 100


def test_messages_are_durable_and_say_what_they_are(publisher: Publisher, settings: BrokerSettings) -> None:
    publisher.publish(message(1)).result(60)
    connection = connect(settings, name="test")
    method, properties, body = connection.channel().basic_get(QUEUE, auto_ack=True)
    connection.close()
    assert method is not None
    assert body == b'{"task_id":"t1","task_type":"echo","payload":1}'
    assert properties.delivery_mode == 2
    assert properties.message_id == "t1"
    assert properties.type == "echo"
    assert properties.content_type == "application/json"
    assert properties.headers["x-attempt"] == 1
    assert abs(properties.timestamp - time.time()) < 60


def test_an_unroutable_message_raises(publisher: Publisher) -> None:
    lost = Message("inference.retry.5s", "x", b"{}")  # a fanout with a queue: routable
    publisher.publish(lost).result(60)
    nowhere = Message("amq.direct", "no.such.key", b"{}", message_id="m1")
    good = publisher.publish(message(1))
    bad = publisher.publish(nowhere)
    with pytest.raises(Unroutable, match=r"no\.such\.key"):
        bad.result(60)
    good.result(60)


def test_a_task_type_without_a_queue_is_kept_as_unroutable(
    publisher: Publisher, settings: BrokerSettings
) -> None:
    publisher.publish(Message("inference.tasks", "task_type.unheard-of", b"{}")).result(60)
    connection = connect(settings, name="test")
    method, _properties, _body = connection.channel().basic_get("inference.unroutable", auto_ack=True)
    connection.close()
    assert method is not None
    assert method.routing_key == "task_type.unheard-of"


def test_a_queue_that_is_deleted_while_connected_is_declared_again(
    publisher: Publisher, settings: BrokerSettings
) -> None:
    dead = Message("inference.dead", "task_type.echo.normal", b"{}", message_id="m1")
    connection = connect(settings, name="test")
    connection.channel().queue_delete("inference.dead.echo")

    def published() -> bool:
        try:
            publisher.publish(dead).result(60)
        except Unroutable:
            return False
        return True

    assert not published()
    eventually(published, "a queue for dead letters")
    assert connection.channel().basic_get("inference.dead.echo", auto_ack=True)[2] == b"{}"
    connection.close()


def test_a_full_queue_rejects_what_does_not_fit(
    publisher: Publisher, settings: BrokerSettings, shared_rabbitmq: RabbitMQ
) -> None:
    vhost = settings.amqp_url.rpartition("/")[2]
    shared_rabbitmq.management.put(
        f"/policies/{vhost}/short",
        json={"pattern": r"^inference\.echo\.", "apply-to": "queues", "definition": {"max-length": 5}},
    ).raise_for_status()

    def rejected() -> str | None:  # the policy takes a moment to reach the queue
        try:
            publisher.publish_all([message(1), message(2)]).result(60)
        except PublishRejected as error:
            numbers = [refused.message_id for refused in error.refused]
            return error.message if numbers == [message(1).message_id, message(2).message_id] else None
        return None

    assert "length limit" in eventually(rejected, "a rejected message")


def test_what_a_lost_connection_left_unconfirmed_is_sent_again(
    settings: BrokerSettings, proxied: Callable[[str], tuple[str, TcpProxy]]
) -> None:
    url, proxy = proxied(settings.amqp_url)
    publisher = Publisher(
        settings.model_copy(update={"amqp_url": url}), name="test", topology=topology_for(["echo"])
    )
    publisher.start()
    futures = {}
    for n in range(3000):
        futures[f"t{n}"] = publisher.publish(message(n), timeout=30)
        if n % 500 == 250:
            publisher.wait_connected(10)
            proxy.cut()
    for future in futures.values():
        future.result(30)
    publisher.close()
    assert set(drained(settings, 3000)) == set(futures)


def test_a_publisher_without_a_broker_raises_within_its_limit() -> None:
    publisher = Publisher(BrokerSettings(amqp_url="amqp://127.0.0.1:1/"), name="test")
    publisher.start()
    future = publisher.publish(message(1), timeout=0.5)
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
        future.result(20)  # its limit would else be 30 s
    publisher.close()


def test_nothing_is_sent_after_the_caller_was_told_that_it_failed(
    settings: BrokerSettings, proxied: Callable[[str], tuple[str, TcpProxy]]
) -> None:
    url, proxy = proxied(settings.amqp_url)
    publisher = Publisher(
        settings.model_copy(update={"amqp_url": url}), name="test", topology=topology_for(["echo"])
    )
    publisher.start()
    publisher.wait_connected(10)
    proxy.refuse()
    with pytest.raises(BrokerUnavailable):
        publisher.publish(message(1), timeout=0.3).result(60)
    late = publisher.publish(message(2), timeout=60)
    proxy.refuse(False)
    late.result(60)
    publisher.close()
    assert set(drained(settings, 1)) == {"t2"}  # the first one would stand before it


def test_wrong_credentials_are_named_and_not_tried_in_a_hot_loop(
    fresh_amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = pika.URLParameters(fresh_amqp_url)
    publisher = Publisher(BrokerSettings(amqp_url=f"amqp://nobody:wrong@{url.host}:{url.port}/"), name="test")
    publisher.start()
    with pytest.raises(BrokerUnavailable, match="refuses the user name or password"):
        publisher.wait_connected(3)
    publisher.close()
    assert sum("next attempt" in record.message for record in caplog.records) == 1


def test_a_memory_alarm_makes_publishing_raise_after_its_limit(
    shared_rabbitmq: RabbitMQ, fresh_amqp_url: str
) -> None:
    settings = BrokerSettings(amqp_url=fresh_amqp_url, amqp_blocked_limit=0.5)
    publisher = Publisher(settings, name="test", topology=topology_for(["echo"]))
    publisher.start()
    publisher.wait_connected(10)
    set_memory_alarm(shared_rabbitmq, True)
    try:
        with pytest.raises(BrokerUnavailable, match="blocks publishing"):
            eventually(lambda: publisher.publish(message(1), timeout=3).result(60), "the alarm's effect")
    finally:
        set_memory_alarm(shared_rabbitmq, False)

    def resumed() -> bool:
        try:
            publisher.publish(message(1), timeout=1).result(60)
        except BrokerUnavailable:
            return False
        return True

    eventually(resumed, "publishing after the alarm")
    publisher.close()


def test_closing_fails_what_was_not_confirmed() -> None:
    publisher = Publisher(BrokerSettings(amqp_url="amqp://127.0.0.1:1/"), name="test")
    publisher.start()
    future = publisher.publish(message(1))
    publisher.close(0.2)
    with pytest.raises(BrokerUnavailable, match="closed"):
        future.result(60)
    with pytest.raises(BrokerUnavailable, match="closed"):
        publisher.publish(message(2))


@pytest.mark.parametrize(
    "bad",
    [
        Message("inference.tasks", "task_type.echo", b"{}", {"n": 2**63}),
        Message("inference.tasks", "task_type.echo", b"{}", {"text": "\ud800"}),
        Message("inference.tasks", "task_type.echo", b"{}", {"large": "x" * 132_000}),
        Message("inference.tasks", "task_type.echo", b"{}", message_id="x" * 300),
        Message("inference.tasks", "x" * 300, b"{}"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once_and_disturbs_nobody(
    publisher: Publisher, bad: Message
) -> None:
    with pytest.raises(InvalidTask, match="cannot be sent"):
        publisher.publish(bad)
    publisher.publish(message(1)).result(60)


def test_a_publish_that_waits_for_a_place_while_the_publisher_closes_raises() -> None:
    narrow = BrokerSettings(amqp_url="amqp://127.0.0.1:1/", publish_window=1)
    publisher = Publisher(narrow, name="test")
    publisher.start()
    first = publisher.publish(message(1))
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(lambda: publisher.publish(message(2)).result(60))
        time.sleep(0.1)  # it waits for the window by now; if not, it meets the closed publisher
        publisher.close(0.1)
        with pytest.raises(BrokerUnavailable):
            first.result(60)
        with pytest.raises(BrokerUnavailable):
            second.result(60)


async def test_a_cancelled_wait_for_a_place_takes_none() -> None:
    narrow = BrokerSettings(amqp_url="amqp://127.0.0.1:1/", publish_window=1, publish_timeout=0.5)
    publisher = Publisher(narrow, name="test")
    publisher.start()
    held = publisher.publish(message(1))
    waiting = asyncio.create_task(publisher.confirm(message(2)))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(BrokerUnavailable):
        await asyncio.wrap_future(held)
    third = publisher.publish(message(3), timeout=0.2)  # the one place is free again
    with pytest.raises(BrokerUnavailable):
        await asyncio.wrap_future(third)
    await asyncio.to_thread(publisher.close)


@given(
    headers=st.dictionaries(
        st.text(max_size=20),
        st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=50), st.booleans(), st.none()),
        max_size=4,
    ),
    message_id=st.none() | st.text(max_size=60),
    kind=st.none() | st.text(max_size=30),
)
def test_properties_travel_as_pika_encodes_them(
    headers: dict[str, object], message_id: str | None, kind: str | None
) -> None:
    message = Message("e", "k", b"{}", headers, message_id, kind)
    before = int(time.time())
    found = pika.BasicProperties().decode(message.encoded_properties())
    expected = pika.BasicProperties().decode(b"".join(message.properties().encode()))
    assert before <= found.timestamp <= int(time.time())
    found.timestamp = expected.timestamp
    assert repr(found) == repr(expected)


def test_many_messages_are_confirmed_as_one(publisher: Publisher, settings: BrokerSettings) -> None:
    # More than the window holds, and bodies of none, one and several frames.
    large = Message("", QUEUE, b"x" * 300_000, {}, "large", "echo")
    empty = Message("", QUEUE, b"", {}, "empty", "echo")
    publisher.publish_all([*map(message, range(1500)), large, empty, message(1500)]).result(30)
    seen = drained(settings, 1503)
    assert len(seen) == 1503
    assert set(seen.values()) == {1}


def test_of_many_messages_one_without_a_queue_is_told_and_the_others_arrive(
    publisher: Publisher, settings: BrokerSettings
) -> None:
    lost = Message("", "nowhere", b"{}", {}, "lost", "echo")
    with pytest.raises(Unroutable, match="lost"):
        publisher.publish_all([message(1), lost, message(2)]).result(60)
    assert drained(settings, 2) == {"t1": 1, "t2": 1}


def test_many_messages_survive_a_cut_connection(
    settings: BrokerSettings, proxied: Callable[[str], tuple[str, TcpProxy]]
) -> None:
    url, proxy = proxied(settings.amqp_url)
    through = settings.model_copy(update={"amqp_url": url})
    publisher = Publisher(through, name="test", topology=topology_for(["echo"]))
    publisher.start()
    publisher.wait_connected(10)
    sent = [publisher.publish_all([message(n) for n in range(s, s + 200)]) for s in range(0, 1000, 200)]
    proxy.cut()
    for one in sent:
        one.result(30)
    publisher.close()
    assert len(drained(settings, 1000)) == 1000
