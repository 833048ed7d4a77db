"""The topology on a real RabbitMQ, and the retry levels on it."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import pika
import pytest

from inferq.broker import (
    RETRY_LEVELS,
    BrokerSettings,
    BrokerUnavailable,
    Publisher,
    Topology,
    TopologyMismatch,
    backoff,
    connect,
    job_topology,
    retry_level,
    topology_for,
)
from inferq.broker.topology import Queue
from tests.conftest import RabbitMQ
from tests.waiting import eventually


@pytest.fixture
def settings(fresh_amqp_url: str) -> BrokerSettings:
    return BrokerSettings(amqp_url=fresh_amqp_url)


def apply(settings: BrokerSettings, topology: Topology) -> None:
    connection = connect(settings, name="test")
    try:
        topology.apply(connection.channel())
    finally:
        if connection.is_open:
            connection.close()


def differences(settings: BrokerSettings, topology: Topology) -> list[str]:
    connection = connect(settings, name="test")
    try:
        return [str(difference) for difference in topology.differences(connection)]
    finally:
        connection.close()


def changed(topology: Topology, name: str, argument: str, value: object) -> Topology:
    queues = tuple(
        Queue(queue.name, {**queue.arguments, argument: value}) if queue.name == name else queue
        for queue in topology.queues
    )
    return dataclasses.replace(topology, queues=queues)


def test_it_is_applied_twice_and_then_agrees(settings: BrokerSettings) -> None:
    topology = topology_for(["echo", "ocr"])
    missing = differences(settings, topology)
    assert "queue 'inference.echo.normal': is missing" in missing
    assert len(missing) == len(topology.exchanges) + len(topology.queues)
    apply(settings, topology)
    apply(settings, topology)
    assert differences(settings, topology) == []


def test_a_mismatch_names_the_queue_the_argument_and_both_values(settings: BrokerSettings) -> None:
    ours = topology_for(["echo"])
    apply(settings, changed(ours, "inference.retry.5s", "x-message-ttl", 7000))
    with pytest.raises(TopologyMismatch) as caught:
        apply(settings, ours)
    for part in ("inference.retry.5s", "x-message-ttl", "7000", "5000", "inferq topology apply"):
        assert part in str(caught.value)
    (difference,) = differences(settings, ours)
    assert "'x-message-ttl' is 7000 on the broker and should be 5000" in difference


def test_a_publisher_that_meets_a_mismatch_says_so(settings: BrokerSettings) -> None:
    ours = topology_for(["echo"])
    apply(settings, changed(ours, "inference.echo.low", "x-delivery-limit", 7))
    publisher = Publisher(settings, name="test", topology=ours)
    publisher.start()
    with pytest.raises(TopologyMismatch, match=r"inference\.echo\.low.*x-delivery-limit.*7.*100"):
        publisher.wait_connected(2)
    publisher.close()


@pytest.mark.parametrize("key", ["task_type.echo", "task_type.echo.high", "task_type.echo.low"])
def test_a_retried_message_returns_to_the_queue_it_came_from(settings: BrokerSettings, key: str) -> None:
    fast = changed(topology_for(["echo"]), "inference.retry.5s", "x-message-ttl", 200)
    apply(settings, fast)
    connection = connect(settings, name="test")
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish("inference.retry.5s", key, b"{}", mandatory=True)
    queue = f"inference.echo.{'normal' if key == 'task_type.echo' else key.rpartition('.')[2]}"
    method = eventually(lambda: channel.basic_get(queue, auto_ack=True)[0], "the retried message")
    connection.close()
    assert method.routing_key == key


def test_a_message_that_the_broker_gives_up_is_dead_lettered_under_its_type(settings: BrokerSettings) -> None:
    apply(settings, changed(topology_for(["echo"]), "inference.echo.normal", "x-delivery-limit", 1))
    connection = connect(settings, name="test")
    channel = connection.channel()
    channel.confirm_delivery()
    # Put on the queue by its name: the routing key is not one of ours.
    channel.basic_publish("", "inference.echo.normal", b"{}", mandatory=True)

    def given_up() -> Any:
        method, _properties, _body = channel.basic_get("inference.echo.normal")
        if method is not None:
            channel.basic_reject(method.delivery_tag, requeue=True)
        return channel.basic_get("inference.dead.echo", auto_ack=True)[0]

    dead = eventually(given_up, "the dead letter")
    connection.close()
    assert dead.routing_key == "task_type.echo.normal"


def test_only_what_the_broker_dead_letters_is_copied_also_where_all_once_was(
    settings: BrokerSettings,
) -> None:
    topology = topology_for(["echo"])
    apply(settings, topology)
    with closing(connect(settings, name="test")) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_bind("inference.dropped", "inference.dead", "task_type.#")  # as an earlier version did
        apply(settings, topology)
        for body, headers in ((b"failed", {"x-dead-reason": "invalid"}), (b"retried", {"x-attempt": 2})):
            properties = pika.BasicProperties(headers=headers)
            channel.basic_publish("inference.dead", "task_type.echo.low", body, properties, mandatory=True)
        channel.basic_publish("inference.tasks", "task_type.echo.low", b"rejected", mandatory=True)
        method = eventually(lambda: channel.basic_get("inference.echo.low")[0])
        channel.basic_reject(method.delivery_tag, requeue=False)
        expiring = pika.BasicProperties(expiration="1")
        for name in ("task_type.echo", "task_type.echo.high"):
            channel.basic_publish("inference.tasks", name, b"expired", expiring, mandatory=True)

        def copies() -> list[bytes] | None:
            body = channel.basic_get("inference.dropped", auto_ack=True)[2]
            if body is not None:
                found.append(body)
            return found if len(found) >= 3 else None

        found: list[bytes] = []
        assert sorted(eventually(copies, "copies of what the broker dropped")) == [
            b"expired", b"expired", b"rejected",
        ]  # fmt: skip
        # The letters themselves are all there.
        eventually(
            lambda: channel.queue_declare("inference.dead.echo", passive=True).method.message_count == 5
        )


def test_each_failure_waits_longer_up_to_the_last_level() -> None:
    assert [retry_level(n) for n in (1, 2, 3, 4, 5, 6, 99)] == [5, 30, 120, 600, 3600, 3600, 3600]
    assert tuple(sorted(RETRY_LEVELS)) == RETRY_LEVELS
    with pytest.raises(ValueError, match="from 1"):
        retry_level(0)


def test_backoff_grows_to_its_cap_and_never_to_nothing() -> None:
    for failures in (0, 1, 5, 50, 10_000):
        assert 0.1 <= backoff(failures) <= 15.0
    assert backoff(10) > 7


@pytest.fixture
def restricted(settings: BrokerSettings, shared_rabbitmq: RabbitMQ) -> BrokerSettings:
    """The settings of a user who may write and read everything, and configure nothing."""
    management, vhost = shared_rabbitmq.management, settings.amqp_url.rpartition("/")[2]
    management.put("/users/plain", json={"password": "plain", "tags": ""}).raise_for_status()
    management.put(
        f"/permissions/{vhost}/plain", json={"configure": "^$", "write": ".*", "read": ".*"}
    ).raise_for_status()
    parts = urlsplit(settings.amqp_url)
    return BrokerSettings(amqp_url=f"amqp://plain:plain@{parts.hostname}:{parts.port}{parts.path}")


def test_a_user_who_may_not_configure_uses_what_topology_apply_made(
    settings: BrokerSettings, restricted: BrokerSettings
) -> None:
    publisher = Publisher(restricted, name="test", topology=topology_for(["echo"]))
    publisher.start()
    try:
        eventually(
            lambda: (
                publisher.last_error is not None and "inferq topology apply" in publisher.last_error.message
            ),
            "advice to apply the topology",
        )
    finally:
        publisher.close()
    apply(settings, topology_for(["echo"]))
    publisher = Publisher(restricted, name="test", topology=topology_for(["echo"]))
    publisher.start()
    try:
        publisher.wait_connected(10)
    finally:
        publisher.close()


def test_jobs_wait_for_what_their_user_may_not_declare(
    settings: BrokerSettings, restricted: BrokerSettings
) -> None:
    with closing(connect(restricted, name="test")) as connection:
        with pytest.raises(BrokerUnavailable, match="inferq topology apply"):
            job_topology().ensure(connection)
        apply(settings, job_topology())
        assert not job_topology().ensure(connection)


def test_a_topology_takes_one_round_trip() -> None:
    channel = Mock(name="channel")
    topology_for(["echo", "ocr"]).declare(channel, lambda: None)
    asked = [call for call in channel.method_calls if "callback" in call.kwargs]
    assert len(channel.method_calls) > 30
    assert asked == channel.method_calls[-1:]
