"""Consuming in groups: several deliveries of one lane in hand at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inferq.broker import BrokerSettings, Consumer
from tests.broker.test_consumer import LANES, consume, settings, submit, take, waiting
from tests.proxy import TcpProxy
from tests.waiting import eventually

__all__ = ["consume", "settings", "submit"]  # fixtures


def names(group: list) -> list[str]:
    return [str(delivery.message_id) for delivery in group]


@pytest.mark.parametrize("lanes", [("normal",), LANES])
def test_a_group_is_what_waits_up_to_the_most_that_is_asked_for(
    submit: Callable[..., None], consume: Callable[..., Consumer], lanes: tuple, settings: BrokerSettings
) -> None:
    for n in range(7):
        submit(f"t{n}")
    consumer = consume(lanes, group=5)
    first = consumer.next_group(10, most=3, wait=5)
    second = consumer.next_group(10, most=3, wait=0.05)
    assert (names(first), names(second)) == (["t0", "t1", "t2"], ["t3", "t4"])
    assert consumer.next_group(0.05, most=3, wait=0) == [], "the window is full"
    assert waiting(settings) == 2
    consumer.ack_all(first)
    third = consumer.next_group(10, most=3, wait=0.2)
    assert names(third) == ["t5", "t6"]
    consumer.ack_all([second[0], *third])
    consumer.requeue_all(second[1:])
    (again,) = consumer.next_group(10, most=3, wait=0)
    assert (again.message_id, again.redelivered) == ("t4", True)
    consumer.ack_all([again])
    assert consumer.next_group(0.1, most=3, wait=0) == []
    assert waiting(settings) == 0


def test_a_window_may_be_set_once_the_engine_says_its_batch_size(
    submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    """A consumer connects while the engine loads."""
    for n in range(3):
        submit(f"t{n}")
    consumer = consume(("normal",))
    consumer.wait_connected(10)
    consumer.use_window(3, 6)
    assert names(consumer.next_group(10, most=3, wait=5)) == ["t0", "t1", "t2"]


def test_lanes_come_in_order_and_a_group_is_of_one_lane(
    submit: Callable[..., None], consume: Callable[..., Consumer]
) -> None:
    for n in range(5):
        for lane in reversed(LANES):
            submit(f"{lane}{n}", lane)
    consumer = consume(group=4)
    seen: list[str] = []
    while len(seen) < 15:
        group = consumer.next_group(10, most=4, wait=0.05)
        assert len({delivery.queue for delivery in group}) == 1
        seen += names(group)
        consumer.ack_all(group)
    assert seen == [f"{lane}{n}" for lane in LANES for n in range(5)]


def test_an_urgent_task_overtakes_what_is_not_given_out(
    submit: Callable[..., None], consume: Callable[..., Consumer], settings: BrokerSettings
) -> None:
    for n in range(6):
        submit(f"low{n}", "low")
    consumer = consume(group=4)
    low = consumer.next_group(10, most=2, wait=1)
    submit("high", "high")
    consumer.ack_all(low)
    high = consumer.next_group(10, most=2, wait=0)
    assert names(high) == ["high"]
    eventually(lambda: waiting(settings) == 4, "the lower deliveries are requeued")
    consumer.ack_all(high)
    rest: list[str] = []
    while len(rest) < 4:
        group = consumer.next_group(10, most=2, wait=0.05)
        rest += names(group)
        consumer.ack_all(group)
    assert rest == [f"low{n}" for n in range(2, 6)]


def test_an_early_look_is_good_for_one_ack(
    submit: Callable[..., None], consume: Callable[..., Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.broker.consumer._NEAR_SECONDS", 0)
    for n in range(3):
        submit(f"low{n}", "low")
    consumer = consume()
    first = take(consumer)
    consumer.ack(first)  # asks the lanes whose subscription the first delivery cancelled
    second = take(consumer)
    consumer.look_early()
    submit("high", "high")
    consumer.ack(second)
    third = take(consumer)
    consumer.look_early()
    consumer.ack(third)
    assert names([third, take(consumer)]) == ["low2", "high"]


@pytest.mark.parametrize("end", ["pause", "stop"])
def test_what_is_not_given_out_is_requeued_at_the_end(
    submit: Callable[..., None], consume: Callable[..., Consumer], settings: BrokerSettings, end: str
) -> None:
    for n in range(4):
        submit(f"t{n}")
    consumer = consume(group=4)
    group = consumer.next_group(10, most=2, wait=1)
    eventually(lambda: waiting(settings) == 0)
    getattr(consumer, end)()
    eventually(lambda: waiting(settings) == 2)
    consumer.ack_all(group, more=False)
    if end == "stop":
        assert consumer.next_group(0.1, most=2, wait=0) == []
    else:
        assert names(consumer.next_group(10, most=2, wait=1)) == ["t2", "t3"]


def test_a_cut_connection_redelivers_the_whole_group(
    submit: Callable[..., None],
    consume: Callable[..., Consumer],
    settings: BrokerSettings,
    proxied: Callable[[str], tuple[str, TcpProxy]],
) -> None:
    for n in range(5):
        submit(f"t{n}")
    url, proxy = proxied(settings.amqp_url)
    consumer = consume(url=url, group=5)
    lost = consumer.next_group(10, most=3, wait=1)
    proxy.cut()
    eventually(lambda: not consumer.connected)
    assert not any(consumer.holds(delivery) for delivery in lost)
    consumer.ack_all(lost)
    again: list[str] = []
    while len(again) < 5:
        group = consumer.next_group(10, most=5, wait=0.05)
        again += names(group)
        consumer.ack_all(group)
    assert sorted(again) == [f"t{n}" for n in range(5)]
    eventually(lambda: waiting(settings) == 0)
