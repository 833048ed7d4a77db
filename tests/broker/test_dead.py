"""Dead letters, against a real RabbitMQ: read, sent back, thrown away, whatever interrupts it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pika
import pytest

from inferq.broker import BrokerSettings, DeadLetters, Filter, connect, topology_for, work_queue
from inferq.broker.dead import NoDeadLetters
from inferq.broker.topology import dead_queue
from tests.broker.conftest import set_memory_alarm, too_deep
from tests.conftest import RabbitMQ
from tests.waiting import eventually

QUEUE = work_queue("echo", "normal")


@pytest.fixture
def settings(fresh_amqp_url: str) -> BrokerSettings:
    return BrokerSettings(amqp_url=fresh_amqp_url)


@pytest.fixture
def channel(settings: BrokerSettings) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    connection = connect(settings, name="test")
    channel = connection.channel()
    topology_for(["echo"]).apply(channel)
    channel.confirm_delivery()
    yield channel
    connection.close()


def bury(
    channel: pika.adapters.blocking_connection.BlockingChannel,
    count: int,
    *,
    reason: str = "bad",
    **more: Any,
) -> list[str]:
    """Put so many dead letters of one reason into the queue, each a minute older than the one after it.

    `more` are further headers.
    """
    names = [f"{reason}{n}" for n in range(count)]
    for n, name in enumerate(names):
        time_of_death = datetime.now(UTC) - timedelta(minutes=count - n)
        headers = {"x-dead-reason": reason, "x-dead-time": time_of_death.isoformat(), "x-attempt": 5, **more}
        channel.basic_publish(
            "inference.dead",
            "task_type.echo.normal",
            f'{{"task_id": "{name}", "task_type": "echo"}}'.encode(),
            pika.BasicProperties(delivery_mode=2, message_id=name, headers=headers),
            mandatory=True,
        )
    return names


def ids(settings: BrokerSettings, queue: str) -> list[str]:
    """The ids in a queue, which keeps its messages."""
    connection = connect(settings, name="test")
    channel = connection.channel()
    found = []
    while (answer := channel.basic_get(queue))[0] is not None:
        assert answer[1] is not None
        found.append(str(answer[1].message_id))
    connection.close()
    return found


def test_filters_choose_by_reason_id_time_and_number(
    settings: BrokerSettings, channel: pika.adapters.blocking_connection.BlockingChannel
) -> None:
    bury(channel, 5, reason="a")
    bury(channel, 5, reason="b")
    lately = datetime.now(UTC) - timedelta(minutes=2, seconds=30)
    with DeadLetters(settings, "echo") as letters:
        assert [letter.task_id for letter in letters.read(Filter(limit=2))] == ["a0", "a1"]
        for wanted, expected in (
            (Filter(reason="b"), ["b0", "b1", "b2", "b3", "b4"]),
            (Filter(task_id="a3"), ["a3"]),
            (Filter(since=lately), ["a3", "b3", "a4", "b4"]),
            (Filter(reason="none such"), []),
        ):
            assert [letter.task_id for letter in letters.read(wanted)] == expected
        assert len(letters.read(Filter(reason="b", since=lately, limit=1))) == 1
        assert {letter.reason for letter in letters.purge(Filter(reason="b", since=lately))} == {"b"}
        assert [letter.task_id for letter in letters.redrive(Filter(task_id="b1"))] == ["b1"]
        assert [letter.task_id for letter in letters.redrive(Filter(reason="b", limit=1))] in (["b0"], ["b2"])
    assert len(ids(settings, dead_queue("echo"))) == 6
    assert len(ids(settings, QUEUE)) == 2


def test_a_redrive_that_is_killed_leaves_each_message_in_one_queue_at_least(
    settings: BrokerSettings, channel: pika.adapters.blocking_connection.BlockingChannel
) -> None:
    names = bury(channel, 400)
    program = (
        "from inferq.broker import BrokerSettings, DeadLetters\n"
        "with DeadLetters(BrokerSettings.load(), 'echo') as letters: letters.redrive()"
    )
    kills = 0
    dead: list[str] = []
    back: list[str] = []
    while channel.queue_declare(dead_queue("echo"), passive=True).method.message_count:
        moved = channel.queue_declare(QUEUE, passive=True).method.message_count
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={"INFERQ_AMQP_URL": settings.amqp_url}
        )
        while process.poll() is None:
            if channel.queue_declare(QUEUE, passive=True).method.message_count >= moved + 60:
                process.kill()
                kills += 1
                process.wait()

        def complete() -> bool:
            nonlocal dead, back
            dead, back = ids(settings, dead_queue("echo")), ids(settings, QUEUE)
            return set(dead) | set(back) == set(names)

        # The broker gives back what the killed one had in hand once it sees the closed socket.
        eventually(complete, "each message in one of the queues")
        assert len(dead) + len(back) - len(names) <= kills, "more than the one at hand is in both"
    assert kills >= 3
    assert set(ids(settings, QUEUE)) == set(names)


def test_a_redrive_gives_up_in_an_alarm_and_can_be_run_again(
    shared_rabbitmq: RabbitMQ,
    settings: BrokerSettings,
    channel: pika.adapters.blocking_connection.BlockingChannel,
) -> None:
    names = bury(channel, 3)
    program = (
        "from inferq.broker import BrokerSettings, DeadLetters\n"
        "with DeadLetters(BrokerSettings.load(), 'echo') as letters: letters.redrive()"
    )
    env = {"INFERQ_AMQP_URL": settings.amqp_url, "INFERQ_AMQP_BLOCKED_LIMIT": "3"}
    said = []
    set_memory_alarm(shared_rabbitmq, True)
    try:
        for left, interrupted in ((2, False), (1, True)):
            process = subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE)
            try:
                while channel.queue_declare(dead_queue("echo"), passive=True).method.message_count > left:
                    assert process.poll() is None
                if interrupted:
                    time.sleep(0.5)  # until it waits for the confirm, which nothing outside it shows
                    process.send_signal(signal.SIGINT)
                said.append(process.communicate(timeout=30)[1].decode().splitlines()[-1])
            finally:
                process.kill()
    finally:
        set_memory_alarm(shared_rabbitmq, False)
    assert "BrokerUnavailable: RabbitMQ has blocked publishing for 3 s, in a memory or disk alarm" in said[0]
    assert said[1] == "KeyboardInterrupt"
    eventually(
        lambda: channel.queue_declare(dead_queue("echo"), passive=True).method.message_count == 3,
        "the dead letters that were looked at, back in their queue",
    )
    with DeadLetters(settings, "echo") as letters:
        letters.redrive()
    assert ids(settings, dead_queue("echo")) == []
    assert set(ids(settings, QUEUE)) == set(names)


def test_a_dead_letter_whose_headers_are_nested_too_deeply_hinders_no_other(
    settings: BrokerSettings, channel: pika.adapters.blocking_connection.BlockingChannel
) -> None:
    bury(channel, 2, reason="d", deep=too_deep(list))
    bury(channel, 1)
    with DeadLetters(settings, "echo") as letters:
        found = {letter.task_id: letter.reason for letter in letters.read()}
        assert found == {"d0": "unknown", "d1": "unknown", "bad0": "bad"}
        assert [letter.task_id for letter in letters.redrive(Filter(task_id="d0"))] == ["d0"]
        assert [letter.task_id for letter in letters.purge(Filter(task_id="d1"))] == ["d1"]
    assert ids(settings, dead_queue("echo")) == ["bad0"]
    assert ids(settings, QUEUE) == ["d0"]


def test_a_type_without_dead_letters_is_named(settings: BrokerSettings) -> None:
    with (
        DeadLetters(settings, "nosuch") as letters,
        pytest.raises(NoDeadLetters, match=r"inference\.dead\.nosuch"),
    ):
        letters.read()


def test_reading_takes_no_round_trip_for_each_and_stops_at_the_match(
    settings: BrokerSettings,
    channel: pika.adapters.blocking_connection.BlockingChannel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = bury(channel, 250)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a round trip for a single message")

    monkeypatch.setattr(pika.adapters.blocking_connection.BlockingChannel, "basic_get", refused)
    with DeadLetters(settings, "echo") as letters:
        assert [letter.task_id for letter in letters.read(Filter(task_id="bad3", limit=1))] == ["bad3"]
        found = letters._matching(letters._sent_ahead(letters._open()), Filter(task_id="bad3", limit=1))
        assert len(list(found)) == 1
        left = channel.queue_declare(dead_queue("echo"), passive=True).method.message_count
        assert left >= 150, "it reads on after the match"
    with DeadLetters(settings, "echo") as letters:
        eventually(
            lambda: channel.queue_declare(dead_queue("echo"), passive=True).method.message_count == 250,
            "all dead letters, back in their queue",
        )
        assert sorted(letter.task_id or "" for letter in letters.read()) == sorted(names)
        assert len(letters.read()) == 250
