"""Consumes with prefetch=1 from the lanes of one task type, the most urgent first.

An idle consumer subscribes to all its lanes. The first delivery cancels the subscriptions of the other lanes. When
it is settled, the consumer asks each higher lane for its message count (a round trip each); only then does the ack
admit the next delivery of the same lane. A delivery that arrives while another is in hand is requeued at once.
With one lane, prefetch does all this.
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
"""How long a delivery may stay unacknowledged: twice the longest time limit, for a task taken ahead, and a day's
outage. RabbitMQ supports this from 4.3; older versions have only `consumer_timeout` in their configuration, by
default 30 minutes."""

LEAST_PRIORITY = -(2**30)
"""The lowest consumer priority that a normal consumer may have."""
_LOW_PRIORITY = LEAST_PRIORITY - 1
"""The consumer priority of a `low_priority` consumer: below that of every normal one."""

_SETTLE_SECONDS = 0.02
"""Seconds to wait for the next delivery of the same lane before subscribing to the others."""


class Consumer(BrokerThread):
    """Gives one delivery at a time from `queues`, which lists the most urgent lane first.

    `next` and the settling calls belong to one working thread; none of them waits for the network. RabbitMQ delivers
    to the free consumers of the highest `priority`, from LEAST_PRIORITY to 0. With `low_priority`, it delivers here
    only if no normal consumer is free.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        queues: Sequence[str],
        *,
        name: str,
        topology: Topology | None = None,
        priority: int = 0,
        low_priority: bool = False,
    ) -> None:
        if not queues:
            raise ValueError("a consumer needs at least one queue")
        super().__init__(settings, name=f"{name} consumer", topology=topology)
        self._lanes = tuple(queues)
        self._priority = priority
        self._always_low_priority = low_priority
        self._low_priority = self._subscribed_low_priority = low_priority
        self._inbox: deque[Delivery] = deque()
        self._epoch = 0
        self._tags: dict[str, str] = {}
        self._wanted = False
        self._current: int | None = None
        self._uncertain: set[str] = set()
        self._taken = 0
        self._idle_since: float | None = None
        self._on_empty: Callable[[], None] | None = None
        self._stopped = threading.Event()
        self._settled = threading.Event()
        self._settled.set()

    @property
    def idle_seconds(self) -> float | None:
        """How long all lanes have been subscribed to without a delivery: no message waited for this consumer.

        None while it is not subscribed, or has a delivery. Any thread may ask.
        """
        since = self._idle_since
        return None if since is None else time.monotonic() - since

    # The working thread's side.

    def next(self, timeout: float, *, low_priority: bool = False) -> Delivery | None:
        """The next delivery, or None after `timeout` seconds.

        This call subscribes: a consumer that nobody calls keeps no message from others.
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
            self._turn(limit=0)  # send the cancels of the other lanes before the task runs
        return self._inbox.popleft()

    def holds(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled. Once its channel is lost, the broker redelivers it."""
        return self._channel is not None and delivery.epoch == self._epoch

    def ack(self, delivery: Delivery, *, more: bool = True, low_priority: bool = False) -> None:
        """Acknowledge. `more`: whether to let the next delivery in at once."""
        self._low_priority = low_priority or self._always_low_priority
        self._settle(delivery, more=more, finish=lambda channel: channel.basic_ack(delivery.tag))

    def requeue(self, delivery: Delivery) -> None:
        """Requeue the delivery unchanged."""
        self._settle(
            delivery, more=False, finish=lambda channel: channel.basic_nack(delivery.tag, requeue=True)
        )

    def pause(self) -> None:
        """Unsubscribe until the next call of `next`, and requeue what has arrived."""
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
        """Accept no more deliveries; the current one can still be settled."""
        self._stopped.set()
        self._wanted = False
        self._call(self._unsubscribe)

    def close(self, timeout: float = 5.0) -> None:
        """Finish settling, requeue the rest, and close."""
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
                # The channel is lost, so the broker redelivers the message.
                self._settled.set()
                self._subscribe_all()
                return
            if not self._wanted:
                self._unsubscribe()
                self._current = None
                settled(channel)
                return
            if self._subscribed_low_priority != self._low_priority:
                self._unsubscribe()  # before the ack admits the next delivery
            self._look_above(channel, 0, settled)

        if not self._perform(on_thread):
            self._settled.set()

    def _perform(self, function: Callable[[], None]) -> bool:
        """Run `function` here if this thread has borrowed the loop, else on the connection's thread."""
        if self._borrow_again():
            self._turn(function, limit=0)
            return True
        return self._call(function)

    # On the connection's thread.

    def _opened(self, channel: Channel) -> None:
        self._epoch += 1
        self._tags.clear()
        self._uncertain.clear()
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
        self._idle_since = None

    def _subscribe_all(self) -> None:
        """Subscribe to the lanes, the most urgent first, until one delivers."""
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
        if self._idle_since is None:
            self._idle_since = time.monotonic()

    def _subscribe(self, channel: Channel, lane: int) -> None:
        """Subscribe to a lane, and to the next one only if this one delivers nothing.

        The passive declaration is a barrier: its reply comes after a delivery, if the lane holds one.
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
                # A race: another lane was faster, or this subscription is being cancelled.
                channel.basic_nack(_tag(method), requeue=True)
                return
            self._take(channel, lane, delivery_from(name, epoch, method, properties, body))

        def subscribed(_frame: object) -> None:
            if lane + 1 < len(self._lanes):
                channel.queue_declare(name, passive=True, callback=lambda _frame: go_on())
            else:
                go_on()

        arguments = {"x-consumer-timeout": HOLD_SECONDS * 1000}
        if priority := _LOW_PRIORITY if self._subscribed_low_priority else self._priority:
            arguments["x-priority"] = priority
        self._tags[name] = channel.basic_consume(name, deliver, callback=subscribed, arguments=arguments)

    def _unless_taken(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function`, made to do nothing if a delivery arrives before it is called."""
        taken = self._taken
        return lambda: function() if taken == self._taken else None

    def _take(self, channel: Channel, lane: int, delivery: Delivery) -> None:
        self._current = lane
        self._idle_since = None
        self._taken += 1
        self._wanted = False
        self._inbox.append(delivery)
        for name in self._lanes[:lane]:
            if name in self._tags:
                self._uncertain.add(name)
        for name in self._lanes:
            if name != delivery.queue:
                self._cancel(channel, name)
        if self._uncertain:
            # A barrier: pika sends the next declaration, which is that of _look_above, after this one's reply.
            # What the cancelled subscriptions were sent until then has been requeued.
            channel.queue_declare(delivery.queue, passive=True, callback=lambda _frame: None)

    def _cancel(self, channel: Channel, name: str) -> None:
        tag = self._tags.pop(name, None)
        if tag is not None:
            channel.basic_cancel(tag)

    def _unsubscribe(self) -> None:
        channel = self._channel
        if channel is None or not channel.is_open:
            return
        self._idle_since = None
        for name in self._lanes:
            self._cancel(channel, name)

    def _look_above(self, channel: Channel, lane: int, finish: Callable[[Channel], None]) -> None:
        """Ask the lanes from `lane` to the current one for messages, then `finish` the current delivery.

        It uses a passive declaration, which the queue's leader answers from memory. `basic.get` would write a
        command to the queue's log each time. Only a lane whose subscription was cancelled since is asked by
        `basic.get` all the same: it may have sent a message that we requeued, and the count does not yet show that.
        """
        current = self._current
        if current is None or lane >= current:
            self._finish_in_lane(channel, finish)
            return
        name = self._lanes[lane]

        def counted(frame: pika.frame.Method[Any]) -> None:
            if frame.method.message_count or name in self._uncertain:
                self._uncertain.discard(name)
                self._get(channel, lane, finish)
            else:
                self._look_above(channel, lane + 1, finish)

        channel.queue_declare(name, passive=True, callback=counted)

    def _get(self, channel: Channel, lane: int, finish: Callable[[Channel], None]) -> None:
        """Take a message from a higher lane, unless another worker was faster."""
        name, epoch, current = self._lanes[lane], self._epoch, self._current

        def got(
            _channel: Channel,
            method: spec.Basic.GetOk,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            # Cancel before the ack, so that the old lane delivers nothing more.
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
            # Usually the same lane delivers next; subscribing to all lanes first would delay that.
            self._later(_SETTLE_SECONDS, self._unless_taken(self._subscribe_all))
        else:
            self._subscribe_all()

    def _cancelled(self, frame: pika.frame.Method[Any]) -> None:
        # The queue was deleted or lost its node: reconnect, which declares and subscribes again.
        queue = next((q for q, tag in self._tags.items() if tag == frame.method.consumer_tag), "a queue")
        _log.warning("%s: RabbitMQ cancelled the subscription to %s; subscribing again", self.name, queue)
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
    """A Delivery from what pika gives."""
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
