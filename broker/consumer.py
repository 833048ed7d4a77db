"""Consuming with prefetch=1 from the lanes of one task type, the most urgent first.

An idle consumer is subscribed to all its lanes. The first delivery ends the subscriptions of the other
lanes; once it is settled, the lanes above its own are asked whether they hold a message (a round trip each)
before the acknowledgement lets the next one of the same lane in. A message that arrives although one is in
hand is given back at once. With one lane none of this happens: prefetch does it all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pika
from pika import spec
from pika.channel import Channel

from inferq.broker.connection import BrokerThread
from inferq.broker.messages import Delivery
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import Topology

_log = logging.getLogger(__name__)

HOLD_SECONDS = 3 * 86_400
"""How long a delivery may be in hand: the longest time limit, twice where it was taken ahead of another that
takes as long, and a day's outage. RabbitMQ heeds it from 4.3 on; an older one knows `consumer_timeout` in its
configuration only, by default half an hour."""

_LOW_PRIORITY = -1
"""The consumer priority of one that gives way; that of all others is 0."""

_SETTLE_SECONDS = 0.02
"""How long a lane that may hold more is waited for before the other lanes are subscribed to again."""


class Consumer(BrokerThread):
    """Hands out one delivery at a time from `queues`, given with the most urgent lane first.

    `next` and the settling calls belong to one working thread; nothing they do waits for the network.
    One that `gives_way`, for good or until it is told otherwise, gets a delivery only where no consumer that
    does not would take it: its subscriptions have a lower consumer priority.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        queues: Sequence[str],
        *,
        name: str,
        topology: Topology | None = None,
        low_priority: bool = False,
    ) -> None:
        if not queues:
            raise ValueError("a consumer needs at least one queue")
        super().__init__(settings, name=f"{name} consumer", topology=topology)
        self._lanes = tuple(queues)
        self._always_low_priority = low_priority
        self._low_priority = self._subscribed_low_priority = low_priority
        self._inbox: deque[Delivery] = deque()
        self._epoch = 0
        self._tags: dict[str, str] = {}
        self._wanted = False
        self._current: int | None = None
        self._taken = 0
        self._on_empty: Callable[[], None] | None = None
        self._stopped = threading.Event()
        self._settled = threading.Event()
        self._settled.set()

    # The working thread's side.

    def next(self, timeout: float, *, low_priority: bool = False) -> Delivery | None:
        """The next delivery, or None if none came within `timeout` seconds.

        Asking is what makes a lane deliver: a consumer that is not asked holds no message back from others.
        """
        end = time.monotonic() + timeout
        self._low_priority = low_priority or self._always_low_priority
        as_wanted = self._wanted and self._subscribed_low_priority == self._low_priority
        if not self._inbox and not as_wanted and not self._stopped.is_set():
            self._wanted = True
            self._perform(self._subscribe_all)
        while not self._inbox:
            left = end - time.monotonic()
            if left <= 0:
                return None
            if self._borrow(left):
                self._turn(limit=left)
        if len(self._lanes) > 1 and self._borrow_again():
            self._turn(limit=0)  # what ended the other lanes' subscriptions must not wait for the task
        return self._inbox.popleft()

    def holds(self, delivery: Delivery) -> bool:
        """Whether the delivery is still ours; with its channel lost, the broker hands it out again."""
        return self._channel is not None and delivery.epoch == self._epoch

    def ack(self, delivery: Delivery, *, more: bool = True, low_priority: bool = False) -> None:
        """Done with it. `more` says that the next delivery is wanted at once."""
        self._low_priority = low_priority or self._always_low_priority
        self._settle(delivery, more=more, finish=lambda channel: channel.basic_ack(delivery.tag))

    def requeue(self, delivery: Delivery) -> None:
        """Let another worker have it, as it was."""
        self._settle(
            delivery, more=False, finish=lambda channel: channel.basic_nack(delivery.tag, requeue=True)
        )

    def pause(self) -> None:
        """Hold nothing back from others until `next` is called again; what has come since goes back."""
        self._wanted = False

        def on_thread() -> None:
            self._unsubscribe()
            channel = self._channel
            while self._inbox:
                delivery = self._inbox.popleft()
                self._current = None
                if channel is not None and channel.is_open and delivery.epoch == self._epoch:
                    channel.basic_nack(delivery.tag, requeue=True)

        self._perform(on_thread)

    def stop(self) -> None:
        """Take no more deliveries; the one in hand can still be settled."""
        self._stopped.set()
        self._wanted = False
        self._call(self._unsubscribe)

    def close(self, timeout: float = 5.0) -> None:
        """Settle what is being settled, give back the rest, and end."""
        self._stopped.set()
        self._settled.wait(timeout)
        super().close(timeout)

    def _settle(self, delivery: Delivery, *, more: bool, finish: Callable[[Channel], None]) -> None:
        self._wanted = more and not self._stopped.is_set()
        self._settled.clear()

        def settled(channel: Channel) -> None:
            finish(channel)
            self._settled.set()

        def on_thread() -> None:
            channel = self._channel
            if channel is None or not channel.is_open or delivery.epoch != self._epoch:
                # Its channel is gone, and the broker hands the message out again.
                self._settled.set()
                self._subscribe_all()
                return
            if not self._wanted:
                self._unsubscribe()
                self._current = None
                settled(channel)
                return
            if self._subscribed_low_priority != self._low_priority:
                self._unsubscribe()  # before this delivery makes room for the next one
            self._look_above(channel, 0, settled)

        if not self._perform(on_thread):
            self._settled.set()

    def _perform(self, function: Callable[[], None]) -> bool:
        """Run `function` as on the connection's thread, on this one where it has borrowed the loop."""
        if self._borrow_again():
            self._turn(function, limit=0)
            return True
        return self._call(function)

    # The connection's thread.

    def _opened(self, channel: Channel) -> None:
        self._epoch += 1
        self._tags.clear()
        self._current = None
        self._on_empty = None
        channel.basic_qos(prefetch_count=1)
        channel.add_callback(self._got_nothing, [spec.Basic.GetEmpty], one_shot=False)
        channel.add_on_cancel_callback(self._cancelled)
        if self._wanted:
            self._subscribe_all()

    def _lost(self) -> None:
        self._settled.set()
        self._tags.clear()
        self._current = None

    def _subscribe_all(self) -> None:
        """Subscribe to every lane, from the most urgent down, until one of them delivers."""
        channel = self._channel
        if channel is None or not channel.is_open or not self._wanted or self._current is not None:
            return
        if self._subscribed_low_priority != self._low_priority:
            self._unsubscribe()
            self._subscribed_low_priority = self._low_priority
        for lane, name in enumerate(self._lanes):
            if name not in self._tags:
                self._subscribe(channel, lane)
                return

    def _subscribe(self, channel: Channel, lane: int) -> None:
        """Subscribe to a lane, and to the next one only after this one had its say.

        What the lane holds follows the broker's answer to the subscription. The question after that is a
        barrier: its answer comes behind the delivery, if there is one.
        """
        name = self._lanes[lane]
        epoch = self._epoch
        go_on = self._unless_taken(self._subscribe_all)

        def deliver(
            _channel: Channel,
            method: spec.Basic.Deliver,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            if self._current is not None or not self._wanted:
                # A race: another lane was faster, or the subscription was about to end.
                channel.basic_nack(_tag(method), requeue=True)
                return
            self._take(channel, lane, delivery_from(name, epoch, method, properties, body))

        def subscribed(_frame: object) -> None:
            if lane + 1 < len(self._lanes):
                channel.queue_declare(name, passive=True, callback=lambda _frame: go_on())

        arguments = {"x-consumer-timeout": HOLD_SECONDS * 1000}
        if self._subscribed_low_priority:
            arguments["x-priority"] = _LOW_PRIORITY
        self._tags[name] = channel.basic_consume(name, deliver, callback=subscribed, arguments=arguments)

    def _unless_taken(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function`, which does nothing once a delivery has come that had not come now."""
        taken = self._taken
        return lambda: function() if taken == self._taken else None

    def _take(self, channel: Channel, lane: int, delivery: Delivery) -> None:
        self._current = lane
        self._taken += 1
        self._wanted = False
        self._inbox.append(delivery)
        for name in self._lanes:
            if name != delivery.queue:
                self._cancel(channel, name)

    def _cancel(self, channel: Channel, name: str) -> None:
        tag = self._tags.pop(name, None)
        if tag is not None:
            channel.basic_cancel(tag)

    def _unsubscribe(self) -> None:
        channel = self._channel
        if channel is None or not channel.is_open:
            return
        for name in self._lanes:
            self._cancel(channel, name)

    def _look_above(self, channel: Channel, lane: int, finish: Callable[[Channel], None]) -> None:
        """Ask the lanes from `lane` up to the current one for a message; then `finish` the one in hand.

        The question is a passive declaration, which the queue's leader answers from memory; `basic.get`
        would be a command in the queue's log each time, whether there is a message or not.
        """
        current = self._current
        if current is None or lane >= current:
            self._finish_in_lane(channel, finish)
            return
        name = self._lanes[lane]

        def counted(frame: pika.frame.Method[Any]) -> None:
            if frame.method.message_count:
                self._get(channel, lane, finish)
            else:
                self._look_above(channel, lane + 1, finish)

        channel.queue_declare(name, passive=True, callback=counted)

    def _get(self, channel: Channel, lane: int, finish: Callable[[Channel], None]) -> None:
        """Take a message from a more urgent lane, unless another worker was faster."""
        name, epoch, current = self._lanes[lane], self._epoch, self._current

        def got(
            _channel: Channel,
            method: spec.Basic.GetOk,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            # The old lane must not deliver once its message is settled: first the cancel, then the ack.
            if current is not None:
                self._cancel(channel, self._lanes[current])
            finish(channel)
            self._current = None
            if self._wanted:
                self._take(channel, lane, delivery_from(name, epoch, method, properties, body))
            else:
                channel.basic_nack(_tag(method), requeue=True)

        self._on_empty = lambda: self._look_above(channel, lane + 1, finish)
        channel.basic_get(name, got)

    def _got_nothing(self, _frame: object) -> None:
        on_empty, self._on_empty = self._on_empty, None
        if on_empty is not None:
            on_empty()

    def _finish_in_lane(self, channel: Channel, finish: Callable[[Channel], None]) -> None:
        lane, self._current = self._current, None
        finish(channel)
        if len(self._lanes) > 1 and lane is not None and self._lanes[lane] in self._tags:
            # More of the same lane is probably on its way; subscribing to all would cost it the time.
            self._later(_SETTLE_SECONDS, self._unless_taken(self._subscribe_all))
        else:
            self._subscribe_all()

    def _cancelled(self, frame: pika.frame.Method[Any]) -> None:
        # The queue was deleted or its node went away: a fresh channel declares and subscribes anew.
        queue = next((q for q, tag in self._tags.items() if tag == frame.method.consumer_tag), "a queue")
        _log.warning("%s: RabbitMQ ended the subscription to %s; subscribing anew", self.name, queue)
        if self._connection is not None:
            with suppress(Exception):
                self._connection.close(320, "consumer cancelled")


def delivery_from(
    queue_name: str,
    epoch: int,
    method: spec.Basic.Deliver | spec.Basic.GetOk,
    properties: pika.BasicProperties,
    body: bytes,
) -> Delivery:
    """A delivery as pika hands it over, in our own terms."""
    timestamp = None
    with suppress(TypeError, ValueError, OverflowError, OSError):
        timestamp = datetime.fromtimestamp(properties.timestamp, UTC) if properties.timestamp else None
    return Delivery(
        queue=queue_name,
        tag=_tag(method),
        epoch=epoch,
        body=body,
        routing_key=method.routing_key or "",
        headers=properties.headers or {},
        redelivered=bool(method.redelivered),
        message_id=properties.message_id,
        timestamp=timestamp,
    )


def _tag(method: spec.Basic.Deliver | spec.Basic.GetOk) -> int:
    return int(method.delivery_tag or 0)
