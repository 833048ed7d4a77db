"""The consumer against a model of RabbitMQ in which every method, reply and delivery arrives when the test says."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast
from unittest import mock

import pika
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pika import amqp_object, spec
from pika.channel import Channel

from inferq.broker import BrokerSettings, Consumer, Delivery
from inferq.broker.lanes import delivery_from
from inferq.broker.pipelined_channel import OnGet, OnMessage, PipelinedChannel

LANES = ("high", "normal", "low")


class Broker:
    """Queues, and one channel: what the client sent waits in `sent`, what it is sent in `answers`."""

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.queues: dict[str, deque[str]] = {name: deque() for name in LANES}
        self.sent: deque[Callable[[], None]] = deque()
        self.answers: deque[Callable[[], None]] = deque()
        self.consumers: dict[str, tuple[str, OnMessage]] = {}
        self.unsettled: dict[int, tuple[str, str, str | None]] = {}  # queue, message, consumer
        self.acked: list[int] = []
        self.nacked: list[int] = []
        self.tag = 0

    def publish(self, queue: str, message: str) -> None:
        self.queues[queue].append(message)
        self.deliver()

    def deliver(self) -> None:
        for consumer, (queue, on_message) in self.consumers.items():
            while self.queues[queue] and self._held(consumer) < self.prefetch:
                message = self._hand_out(queue, consumer)
                method = spec.Basic.Deliver(consumer, self.tag)
                self.answers.append(partial(on_message, consumer, method, message, b""))

    def get(self, queue: str, got: OnGet, empty: Callable[[], None]) -> None:
        if self.queues[queue]:
            message = self._hand_out(queue, None)
            self.answers.append(partial(got, spec.Basic.GetOk(self.tag), message, b""))
        else:
            self.answers.append(empty)

    def settle(self, method: amqp_object.Method) -> None:
        match method:
            case spec.Basic.Cancel():
                del self.consumers[str(method.consumer_tag)]
            case spec.Basic.Ack():
                assert method.delivery_tag in self.unsettled, "acknowledged, but unknown or settled before"
                below = [tag for tag in self.unsettled if tag <= method.delivery_tag]
                for tag in below if method.multiple else [method.delivery_tag]:
                    del self.unsettled[tag]
                    self.acked.append(tag)
            case spec.Basic.Nack():
                queue, message, _ = self.unsettled.pop(method.delivery_tag)
                self.queues[queue].appendleft(message)
                self.nacked.append(method.delivery_tag)
        self.deliver()

    def lose_channel(self) -> None:
        self.sent.clear()
        self.answers.clear()
        self.consumers.clear()
        for queue, message, _ in reversed(self.unsettled.values()):
            self.queues[queue].appendleft(message)
        self.unsettled.clear()
        self.tag = 0

    def _held(self, consumer: str) -> int:
        return sum(holder == consumer for _, _, holder in self.unsettled.values())

    def _hand_out(self, queue: str, consumer: str | None) -> pika.BasicProperties:
        self.tag += 1
        message = self.queues[queue].popleft()
        self.unsettled[self.tag] = (queue, message, consumer)
        return pika.BasicProperties(message_id=message)


class Wire:
    """Stands for PipelinedChannel."""

    is_open = True
    round_trip = 1.0

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._consumers = 0

    def send(self, methods: Iterable[amqp_object.Method]) -> None:
        self._broker.sent.extend(partial(self._broker.settle, method) for method in methods)

    def consume(
        self,
        queue: str,
        on_message: OnMessage,
        *,
        arguments: Mapping[str, Any],
        then: Callable[[], None] | None = None,
    ) -> str:
        self._consumers += 1
        tag = str(self._consumers)

        def begin() -> None:
            if then is not None:
                self._broker.answers.append(then)
            self._broker.consumers[tag] = (queue, on_message)
            self._broker.deliver()

        self._broker.sent.append(begin)
        return tag

    def cancelling(self, tags: Sequence[str]) -> list[amqp_object.Method]:
        return [spec.Basic.Cancel(tag) for tag in tags]  # type: ignore[arg-type]

    def count(
        self,
        queues: Sequence[str],
        then: Callable[[list[int]], None],
        *,
        before: Sequence[amqp_object.Method] = (),
    ) -> None:
        def answer() -> None:
            counts = [len(self._broker.queues[queue]) for queue in queues]
            self._broker.answers.append(lambda: then(counts))

        self._broker.sent.append(answer)
        self.send(before)

    def get(self, queue: str, got: OnGet, empty: Callable[[], None]) -> None:
        self._broker.sent.append(lambda: self._broker.get(queue, got, empty))


class ModelConsumer(Consumer):
    """Runs everything at once; its timers go off when the test says."""

    def __init__(self, group: int) -> None:
        super().__init__(BrokerSettings(), LANES, name="model", group=group)
        self.timers: deque[Callable[[], None]] = deque()

    def open(self, broker: Broker) -> None:
        self.timers.clear()
        self._channel = cast("Channel", object())
        self._epoch += 1
        self._forget()
        self._wire = cast("PipelinedChannel", Wire(broker))
        if self._wanted:
            self._subscribe_all()

    def lose(self) -> None:
        self._channel = None
        self._lost()

    def _call(self, function: Callable[[], None]) -> bool:
        function()
        return True

    def _later(self, seconds: float, function: Callable[[], None]) -> None:
        self.timers.append(function)


def test_the_look_above_and_the_next_delivery_take_one_round_trip() -> None:
    broker, consumer = Broker(1), ModelConsumer(1)
    consumer.open(broker)
    taken: list[Delivery] = []

    def take(*, round_trips: int) -> str | None:
        assert consumer.next(0) is None, "the look above comes first"
        for _ in range(round_trips):
            for queue in (broker.sent, broker.answers):
                for _ in range(len(queue)):
                    queue.popleft()()
        if delivery := consumer.next(0):
            taken.append(delivery)
        return delivery.message_id if delivery else None

    for n in range(3):
        broker.publish("low", f"low{n}")
    assert take(round_trips=3) == "low0"
    assert take(round_trips=1) is None  # while the task runs, RabbitMQ reads the cancels of the other lanes
    consumer.ack(taken[-1])
    assert take(round_trips=1) == "low1"
    broker.publish("high", "high")
    consumer.ack(taken[-1])
    assert take(round_trips=1) is None
    assert take(round_trips=1) == "high"


class ConsumerMachine(RuleBasedStateMachine):
    @initialize(group=st.sampled_from([1, 2, 4]), groups=st.sampled_from([1, 2]))
    def begin(self, group: int, groups: int) -> None:
        # Time passes only when something is published: what was counted before is then old.
        self.now = 0.0
        clock = mock.Mock(monotonic=lambda: self.now)
        self.clock = ExitStack()
        for module in ("consumer", "lanes"):
            self.clock.enter_context(mock.patch(f"inferq.broker.{module}.time", clock))
        self.window = groups * group
        self.broker = Broker(group)
        self.consumer = ModelConsumer(group)
        self.consumer.use_window(group, groups * group)
        self.consumer.open(self.broker)
        self.published = 0
        self.ended: set[str] = set()
        self.hand: list[Delivery] = []
        self.mine: set[int] = set()  # the tags that this test acknowledged or requeued
        self.given: set[int] = set()
        self.early = False

    @rule(lane=st.sampled_from(LANES), count=st.integers(1, 4))
    def publish(self, lane: str, count: int) -> None:
        self.now += 2
        for _ in range(count):
            self.published += 1
            self.broker.publish(lane, f"{lane}{self.published}")

    @precondition(lambda self: self.broker.sent)
    @rule(count=st.integers(1, 3))
    def broker_reads(self, count: int) -> None:
        for _ in range(min(count, len(self.broker.sent))):
            self.broker.sent.popleft()()

    @precondition(lambda self: self.broker.answers)
    @rule(count=st.integers(1, 3))
    def client_reads(self, count: int) -> None:
        for _ in range(min(count, len(self.broker.answers))):
            self.broker.answers.popleft()()

    @precondition(lambda self: self.consumer.timers)
    @rule()
    def timer(self) -> None:
        self.consumer.timers.popleft()()

    @rule(most=st.integers(1, 4))
    def take(self, most: int) -> None:
        self._take(most)

    def _take(self, most: int) -> list[Delivery]:
        group = self.consumer.next_group(0, most=most, wait=0)
        assert len(group) <= most
        assert len({delivery.queue for delivery in group}) <= 1, "a group is of one lane"
        for delivery in group:
            assert self.consumer.holds(delivery)
            assert delivery.tag not in self.broker.nacked, "requeued and given"
            assert delivery.tag not in self.given, "given twice"
            self.given.add(delivery.tag)
        self.hand += group
        return group

    @precondition(lambda self: self.hand)
    @rule(data=st.data(), more=st.booleans())
    def ack(self, data: st.DataObject, more: bool) -> None:
        self._ack(data.draw(self._some()), more=more)

    @precondition(lambda self: self.hand)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        chosen = data.draw(self._some())
        self._settled(chosen)
        self.consumer.requeue_all(chosen)

    @rule()
    def look_early(self) -> None:
        self.consumer.look_early()
        self.early = True

    @rule()
    def pause(self) -> None:
        self.consumer.pause()

    @rule()
    def lose_channel(self) -> None:
        self.broker.lose_channel()
        self.consumer.lose()
        self.broker.acked.clear()
        self.broker.nacked.clear()
        self.mine.clear()
        self.given.clear()
        self.consumer.open(self.broker)
        assert not any(self.consumer.holds(delivery) for delivery in self.hand)

    @rule()
    def an_urgent_task_comes_next(self) -> None:
        """Once all that is in hand is acknowledged, the highest lane that holds a message comes next."""
        self._quiesce()
        looks = any(map(self.consumer.holds, self.hand))
        early, self.early = self.early, self.early and not looks
        self._ack(self.hand)
        group = self._take_patiently()
        waiting = [name for name in LANES if self.broker.queues[name]]
        if group and looks and not early:
            assert not any(LANES.index(name) < LANES.index(group[0].queue) for name in waiting)
        assert group or not waiting, "nothing is given out, although a lane holds a message"

    @invariant()
    def only_what_was_settled_is_settled(self) -> None:
        assert set(self.broker.acked) <= self.mine
        assert not (set(self.broker.nacked) & self.given) - self.mine, "given and requeued"
        assert len(self.broker.acked) == len(set(self.broker.acked))
        assert len(self.consumer._inbox) <= self.window + 1

    def teardown(self) -> None:
        if not hasattr(self, "clock"):
            return
        try:
            self._end_everything()
        finally:
            self.clock.close()

    def _end_everything(self) -> None:
        for _ in range(3 * self.published + 3):
            self._quiesce()
            self._ack(self.hand)
            self._take_patiently()
        self._quiesce()
        assert len(self.ended) == self.published, "a message was left behind"
        assert not self.broker.unsettled
        assert not any(self.broker.queues.values())

    def _some(self) -> st.SearchStrategy[list[Delivery]]:
        indexes = st.lists(st.sampled_from(range(len(self.hand))), min_size=1, unique=True)
        return indexes.map(lambda chosen: [self.hand[index] for index in chosen])

    def _ack(self, deliveries: Sequence[Delivery], *, more: bool = True) -> None:
        chosen = list(deliveries)
        for delivery in chosen:
            if self.consumer.holds(delivery):
                self.ended.add(str(delivery.message_id))
        self._settled(chosen)
        self.consumer.ack_all(chosen, more=more)

    def _settled(self, chosen: Sequence[Delivery]) -> None:
        self.mine |= {delivery.tag for delivery in chosen if self.consumer.holds(delivery)}
        self.hand = [delivery for delivery in self.hand if delivery not in chosen]

    def _take_patiently(self) -> list[Delivery]:
        for _ in range(4):
            self._quiesce()
            if group := self._take(4):
                return group
        return []

    def _quiesce(self) -> None:
        """Let everything arrive, and all timers go off."""
        for _ in range(1000):
            if not (self.broker.sent or self.broker.answers or self.consumer.timers):
                return
            for queue in (self.broker.sent, self.broker.answers, self.consumer.timers):
                while queue:
                    queue.popleft()()
        raise AssertionError("it never comes to rest")


TestConsumer = ConsumerMachine.TestCase
TestConsumer.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_thread_that_waits_for_the_loop_is_woken_by_what_another_one_received() -> None:
    consumer = Consumer(BrokerSettings(), LANES, name="test", group=2)
    waiting = threading.Thread(target=lambda: consumer._borrow(60, lambda: consumer._may_give))
    waiting.start()
    method = spec.Basic.Deliver("1", 1)
    consumer._take(0, delivery_from("high", 0, method, pika.BasicProperties(), b""))
    waiting.join(30)
    assert not waiting.is_alive()
