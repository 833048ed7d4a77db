"""Consumes from the lanes of one task type, the most urgent first: one delivery at a time, or a group of one lane.

An idle consumer subscribes to all its lanes. The first delivery cancels the subscriptions of the other lanes, and the
subscription that stays brings up to `group` deliveries. When deliveries are settled, the consumer asks the higher
lanes for their message counts (one round trip for all); only then do the acks admit more of the same lane. If a
higher lane holds a message, the consumer takes that one next and requeues what it has not given out yet. A delivery
of another lane that arrives meanwhile is requeued at once. With one lane, prefetch does all this.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pika
from pika import amqp_object, spec
from pika.channel import Channel

from inferq.broker.connection import BrokerThread
from inferq.broker.messages import Delivery
from inferq.broker.pipelined_channel import OnMessage, PipelinedChannel
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

_EARLY_SECONDS = 1.0
"""How old the answer of an early look may be when the ack uses it."""


class Consumer(BrokerThread):
    """Gives deliveries from `queues`, which lists the most urgent lane first.

    A subscription delivers up to `group` messages ahead of their acks. With a larger `window`, further deliveries are
    taken while some are in hand, `window` in all: the next group can be prepared meanwhile. `next` and `next_group`
    belong to one thread at a time; any thread may settle. None of these calls waits for the network, except for a
    delivery. RabbitMQ delivers to the free consumers of the highest `priority`, from LEAST_PRIORITY to 0. With
    `low_priority`, it delivers here only if no normal consumer is free.
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
        group: int = 1,
    ) -> None:
        if not queues:
            raise ValueError("a consumer needs at least one queue")
        if group < 1:
            raise ValueError("a group is at least one delivery")
        super().__init__(settings, name=f"{name} consumer", topology=topology)
        self._lanes = tuple(queues)
        self._group = self._window = group
        self._priority = priority
        self._always_low_priority = low_priority
        self._low_priority = self._subscribed_low_priority = low_priority
        self._wire: PipelinedChannel | None = None
        self._inbox: deque[Delivery] = deque()  # all of one lane
        self._unsettled: dict[int, int] = {}  # the lane of each delivery tag in hand or in the inbox
        self._epoch = 0
        self._tags: dict[str, list[str]] = {}  # the subscriptions of each lane
        self._brought: dict[int, str] = {}  # the subscription of each delivery that is not settled
        self._wanted = False  # a thread waits for a delivery, and none has come
        self._accepting = False  # the last call that decides it asked for more
        self._lane: int | None = None  # the lane that delivers; None: the first one that does
        self._uncertain: set[str] = set()
        self._changes = 0
        self._waiting: list[tuple[object, list[int]]] = []  # acks that wait for the look above
        self._looking = False
        self._early: tuple[int, float, list[int]] | None = None  # lane, time and counts of an early look
        self._urgent: set[str] = set()  # the lanes that held messages when `urgent_waits` last looked
        self._unsent = False
        self._idle_since: float | None = None
        self._stopped = threading.Event()
        self._settled = threading.Condition()
        self._settling: set[object] = set()

    def use_window(self, group: int, window: int) -> None:
        """Set how many deliveries a subscription brings, and how many may be in hand in all.

        Only before `start`, or after `pause` and before the next call.
        """
        self._group, self._window = group, max(group, window)

        def on_thread() -> None:
            if self._channel is not None and self._channel.is_open:
                self._channel.basic_qos(prefetch_count=self._group)  # for the subscriptions to come

        self._perform(on_thread)

    @property
    def idle_seconds(self) -> float | None:
        """How long all lanes have been subscribed to without a delivery: no message waited for this consumer.

        None while it is not subscribed, or has a delivery. Any thread may ask.
        """
        since = self._idle_since
        return None if since is None else time.monotonic() - since

    # The working threads' side.

    def next(self, timeout: float, *, low_priority: bool = False) -> Delivery | None:
        """The next delivery, or None after `timeout` seconds.

        This call subscribes: a consumer that nobody calls keeps no message from others.
        """
        end = time.monotonic() + timeout
        while self._wait_for_delivery(end, low_priority):
            with suppress(IndexError):  # `stop` has requeued it
                return self._inbox.popleft()
        return None

    def next_group(
        self, timeout: float, *, most: int, wait: float, low_priority: bool = False
    ) -> list[Delivery]:
        """The next deliveries, at most `most` and all of one lane, or [] after `timeout` seconds.

        From the first delivery on it waits up to `wait` seconds until there are `most`. Further deliveries of the
        lane stay for the next call, which gives them unless a higher lane holds a message by then. Like `next`, this
        call subscribes.
        """
        end = time.monotonic() + timeout
        while self._wait_for_delivery(end, low_priority):
            full = time.monotonic() + wait
            while 0 < len(self._inbox) < most and (left := full - time.monotonic()) > 0:
                if self._borrow(left):
                    self._turn(limit=left)
            group: list[Delivery] = []
            with suppress(IndexError):
                while len(group) < most:
                    group.append(self._inbox.popleft())
            if group:
                return group
        return []

    def holds(self, delivery: Delivery) -> bool:
        """Whether the delivery can still be settled. Once its channel is lost, the broker redelivers it."""
        return self._channel is not None and delivery.epoch == self._epoch

    def ack(self, delivery: Delivery, *, more: bool = True, low_priority: bool = False) -> None:
        """Acknowledge. `more`: whether to let the next delivery in at once."""
        self.ack_all([delivery], more=more, low_priority=low_priority)

    def ack_all(
        self, deliveries: Sequence[Delivery], *, more: bool = True, low_priority: bool = False
    ) -> None:
        """Acknowledge all of them, with one look at the higher lanes. They may be a part of a group."""
        self._low_priority = low_priority or self._always_low_priority
        self._wanted = self._accepting = more and not self._stopped.is_set()
        settling = self._begin_settling()

        def on_thread() -> None:
            wire, tags = self._open(deliveries)
            if wire is None or not tags:
                self._end_settling(settling)
                self._subscribe_all()
            elif not more or self._stopped.is_set():
                self._unsubscribe()
                self._ack(wire, tags)
                self._end_settling(settling)
            else:
                self._waiting.append((settling, tags))
                if not self._looking:
                    self._ack_in_order(wire)

        if not self._perform(on_thread):
            self._end_settling(settling)

    def requeue(self, delivery: Delivery) -> None:
        """Requeue the delivery unchanged."""
        self.requeue_all([delivery])

    def requeue_all(self, deliveries: Sequence[Delivery]) -> None:
        """Requeue all of them unchanged, and unsubscribe until the next call for deliveries."""
        self._wanted = self._accepting = False
        settling = self._begin_settling()

        def on_thread() -> None:
            wire, tags = self._open(deliveries)
            if wire is not None and tags:
                self._unsubscribe()
                self._nack(wire, tags)
            self._end_settling(settling)

        if not self._perform(on_thread):
            self._end_settling(settling)

    def look_early(self) -> None:
        """Look at the higher lanes now, for the next ack: call this when only storing is left to do.

        A message that reaches a higher lane between this look and the ack is found by the look after: one group of a
        lower lane may pass it.
        """
        if self._lane:  # the lane with the number 0 has none above
            self._perform(self._look_early)

    def urgent_waits(self, queue: str) -> bool:
        """Whether a message waited in a lane above `queue` when this was last asked. It begins the next look."""
        above = self._lanes[: self._lanes.index(queue)]
        if not above:
            return False

        def counted(counts: list[int]) -> None:
            self._urgent = {name for name, count in zip(above, counts, strict=True) if count}

        def look() -> None:
            if self._wire is not None and self._wire.is_open:
                self._wire.count(above, counted)

        urgent = not self._urgent.isdisjoint(above)
        self._perform(look)
        return urgent

    def pause(self) -> None:
        """Unsubscribe until the next call of `next`, and requeue what has arrived."""
        self._wanted = self._accepting = False
        self._perform(self._requeue_inbox)

    def stop(self) -> None:
        """Accept no more deliveries, and requeue what is not given out; the rest can still be settled."""
        self._stopped.set()
        self._wanted = self._accepting = False
        self._call(self._requeue_inbox)

    def close(self, timeout: float = 5.0) -> None:
        """Finish settling, requeue the rest, and close."""
        self._stopped.set()
        with self._settled:
            self._settled.wait_for(lambda: not self._settling, timeout)
        super().close(timeout)

    def _wait_for_delivery(self, end: float, low_priority: bool) -> bool:
        """Whether the inbox holds a delivery by the time `end`.

        While acks wait for the look above, what has arrived is not given out: a higher lane may come first.
        """
        self._low_priority = low_priority or self._always_low_priority
        as_wanted = self._wanted and self._subscribed_low_priority == self._low_priority
        if self._window > 1 and self._unsettled:
            as_wanted = False  # it may be time for another lane
        if not self._inbox and not as_wanted and not self._stopped.is_set():
            self._wanted = self._accepting = True
            self._perform(self._subscribe_soon)
        while self._settling or not self._inbox:
            left = end - time.monotonic()
            if left <= 0:
                return False
            if self._borrow(left):
                self._turn(limit=left)
        if self._unsent and self._borrow_again():
            self._unsent = False
            self._turn(limit=0)  # send the cancels of the other lanes before the task runs
        return True

    def _begin_settling(self) -> object:
        settling = object()
        with self._settled:
            self._settling.add(settling)
        return settling

    def _end_settling(self, settling: object) -> None:
        with self._settled:
            self._settling.discard(settling)
            self._settled.notify_all()

    def _perform(self, function: Callable[[], None]) -> bool:
        """Run `function` here if this thread has borrowed the loop, else on the connection's thread."""
        if self._borrow_again():
            self._turn(function, limit=0)
            return True
        return self._call(function)

    # On the connection's thread.

    def _opened(self, channel: Channel) -> None:
        assert self._connection is not None  # noqa: S101
        self._epoch += 1
        self._forget()
        channel.basic_qos(prefetch_count=self._group)
        channel.add_on_cancel_callback(self._cancelled)
        self._wire = PipelinedChannel(self._connection, channel)
        if self._wanted:
            self._subscribe_all()

    def _lost(self) -> None:
        self._wire = None
        self._forget()
        with self._settled:
            self._settling.clear()
            self._settled.notify_all()

    def _forget(self) -> None:
        """Forget the channel that is lost: RabbitMQ redelivers what was not settled."""
        self._inbox.clear()
        self._unsettled.clear()
        self._brought.clear()
        self._tags.clear()
        self._uncertain.clear()
        self._urgent.clear()
        self._waiting.clear()
        self._lane = self._early = self._idle_since = None
        self._looking = False
        self._changes += 1

    def _open(self, deliveries: Sequence[Delivery]) -> tuple[PipelinedChannel | None, list[int]]:
        """The channel, and the tags of those deliveries that can be settled; all others are redelivered."""
        wire = self._wire
        if wire is None or not wire.is_open:
            return None, []
        return wire, [d.tag for d in deliveries if d.epoch == self._epoch and d.tag in self._unsettled]

    # Subscribing.

    def _subscribe_soon(self) -> None:
        """Subscribe to the other lanes unless the lane in hand goes on delivering."""
        as_wanted = self._subscribed_low_priority == self._low_priority or self._window == self._group
        if (
            self._unsettled
            and self._lane is not None
            and self._delivers(self._lanes[self._lane])
            and as_wanted
        ):
            self._later(_SETTLE_SECONDS, self._unless_changed(self._subscribe_all))
        else:
            self._subscribe_all()

    def _subscribe_all(self) -> None:
        """Subscribe to the lanes, the most urgent first, until one delivers."""
        wire = self._wire
        if wire is None or not wire.is_open or not self._wanted or self._inbox:
            return
        if self._stopped.is_set() or len(self._unsettled) + self._group > self._window:
            return
        if self._subscribed_low_priority != self._low_priority:
            self._unsubscribe()
            self._subscribed_low_priority = self._low_priority
        self._lane = None
        missing = [name for name in self._lanes if not self._delivers(name)]
        if not missing:
            if self._idle_since is None and not self._unsettled:
                self._idle_since = time.monotonic()
        elif len(missing) == 1:
            self._subscribe(wire, missing)
        else:
            self._changes += 1
            changes = self._changes

            def counted(counts: list[int]) -> None:
                if changes == self._changes:
                    self._subscribe(wire, _down_to_first(missing, counts))

            wire.count(missing, counted)

    def _delivers(self, name: str) -> bool:
        """Whether a subscription to the lane may deliver more before anything is settled."""
        tags = self._tags.get(name)
        if tags is None:
            return False
        if len(self._brought) < self._group * len(tags):
            return True
        return sum(tag in tags for tag in self._brought.values()) < self._group * len(tags)

    def _subscribe(self, wire: PipelinedChannel, names: Sequence[str]) -> None:
        """Subscribe to these lanes, and then to the others unless one of these delivers.

        The count is a barrier: its reply comes after a delivery, if the last of these lanes holds one.
        """
        self._changes += 1
        go_on = self._unless_changed(self._subscribe_all)
        arguments = {"x-consumer-timeout": HOLD_SECONDS * 1000}
        if priority := _LOW_PRIORITY if self._subscribed_low_priority else self._priority:
            arguments["x-priority"] = priority

        def subscribed() -> None:
            if not all(map(self._delivers, self._lanes)):
                wire.count([names[-1]], lambda _counts: go_on())
            else:
                go_on()

        for name in names:
            then = subscribed if name == names[-1] else None
            tag = wire.consume(name, self._deliver_from(name), arguments=arguments, then=then)
            self._tags.setdefault(name, []).append(tag)

    def _deliver_from(self, name: str) -> OnMessage:
        lane, epoch = self._lanes.index(name), self._epoch

        def deliver(
            consumer_tag: str, method: spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes
        ) -> None:
            wanted = self._wanted if self._lane is None else self._lane == lane
            if not wanted or consumer_tag not in self._tags.get(name, ()):
                # A race: another lane was faster, or this subscription is cancelled.
                self._nack(self._wire, [_tag(method)])
            else:
                self._brought[_tag(method)] = consumer_tag
                self._take(lane, delivery_from(name, epoch, method, properties, body))

        return deliver

    def _take(self, lane: int, delivery: Delivery) -> None:
        """Put a delivery into the inbox. The first one of its lane cancels the subscriptions of the others."""
        self._unsettled[delivery.tag] = lane
        self._inbox.append(delivery)
        self._changes += 1
        self._wanted = False
        self._idle_since = None
        if lane == self._lane:
            return
        self._lane, self._early = lane, None
        self._urgent.discard(delivery.queue)
        self._uncertain.update(name for name in self._lanes[:lane] if name in self._tags)
        others = [name for name in self._tags if name != delivery.queue]
        if others and self._wire is not None:
            self._wire.send(self._cancelling(self._wire, others))
            self._unsent = True

    def _cancelling(self, wire: PipelinedChannel, names: Sequence[str]) -> list[amqp_object.Method]:
        return wire.cancelling([tag for name in names for tag in self._tags.pop(name)])

    def _unsubscribe(self) -> None:
        wire = self._wire
        if wire is None or not wire.is_open:
            return
        self._changes += 1
        self._lane = self._early = self._idle_since = None
        if self._tags:
            wire.send(self._cancelling(wire, list(self._tags)))

    def _requeue_inbox(self) -> None:
        self._unsubscribe()
        wire, tags = self._open(self._empty_inbox())
        self._nack(wire, tags)

    def _empty_inbox(self) -> list[Delivery]:
        inbox: list[Delivery] = []
        with suppress(IndexError):  # a working thread takes from it as well
            while True:
                inbox.append(self._inbox.popleft())
        return inbox

    def _nack(self, wire: PipelinedChannel | None, tags: Sequence[int]) -> None:
        for tag in tags:
            self._unsettled.pop(tag, None)
            self._brought.pop(tag, None)
        if wire is not None and tags:
            wire.send([spec.Basic.Nack(delivery_tag=tag, requeue=True) for tag in tags])

    # Looking above.

    def _look_early(self) -> None:
        wire, lane = self._wire, self._lane
        if wire is None or not wire.is_open or not lane or self._looking:
            return
        began = time.monotonic()

        def counted(counts: list[int]) -> None:
            self._looking = False
            self._early = (lane, began, counts)
            if self._waiting:
                self._ack_in_order(wire)

        self._looking = True
        wire.count(self._lanes[:lane], counted)

    def _ack_in_order(self, wire: PipelinedChannel) -> None:
        """Send the acks that wait, once the higher lanes are asked for messages.

        Acks of another lane than the one that delivers now admit nothing and need no look. A lane whose subscription
        was cancelled since the last look is asked by `basic.get`, whatever its count: it may have sent a message
        that we requeued, and the count does not yet show that. `basic.get` writes a command to the queue's log, so
        the others are not asked by it.
        """
        lane = self._lane
        if not lane or not any(self._unsettled.get(tag) == lane for _, tags in self._waiting for tag in tags):
            self._finish_in_lane(wire)
            return
        early, self._early = self._early, None
        if early is None or early[0] != lane or early[1] < time.monotonic() - _EARLY_SECONDS:
            self._looking = True
            wire.count(self._lanes[:lane], lambda counts: self._get_from(wire, lane, counts))
        else:
            self._looking = True
            self._get_from(wire, lane, early[2])

    def _get_from(self, wire: PipelinedChannel, lane: int, counts: Sequence[int], first: int = 0) -> None:
        """Take a message from the highest lane that has one, unless another worker is faster, and send the acks."""
        above = next((n for n in range(first, lane) if counts[n] or self._lanes[n] in self._uncertain), None)
        if self._lane != lane or above is None:
            self._finish_in_lane(wire)
            return
        name, epoch = self._lanes[above], self._epoch
        self._uncertain.discard(name)

        def got(method: spec.Basic.GetOk, properties: pika.BasicProperties, body: bytes) -> None:
            if not self._accepting:
                self._nack(wire, [_tag(method)])
                self._finish_in_lane(wire)
                return
            # Cancel before the acks, so that the lower lane delivers nothing more.
            self._requeue_inbox()
            self._send_acks(wire)
            self._take(above, delivery_from(name, epoch, method, properties, body))
            if self._group > 1:
                self._subscribe(wire, [name])

        wire.get(name, got, lambda: self._get_from(wire, lane, counts, above + 1))

    def _finish_in_lane(self, wire: PipelinedChannel) -> None:
        full = self._lane is not None and not self._delivers(self._lanes[self._lane])
        if self._subscribed_low_priority != self._low_priority:
            self._unsubscribe()  # before the acks admit the next delivery
        self._send_acks(wire)
        if self._inbox:
            return
        if full and len(self._lanes) > 1 and self._lane is not None and self._lanes[self._lane] in self._tags:
            # Usually the same lane delivers next; subscribing to all lanes first would delay that.
            self._later(_SETTLE_SECONDS, self._unless_changed(self._subscribe_all))
        else:
            self._subscribe_all()

    def _send_acks(self, wire: PipelinedChannel) -> None:
        """Send the acks that wait, in one write."""
        self._looking = False
        waiting, self._waiting = self._waiting, []
        self._ack(wire, [tag for _, tags in waiting for tag in tags])
        for settling, _ in waiting:
            self._end_settling(settling)

    def _ack(self, wire: PipelinedChannel, tags: Sequence[int]) -> None:
        tags = [tag for tag in tags if self._unsettled.pop(tag, None) is not None]
        for tag in tags:
            self._brought.pop(tag, None)
        if tags:
            wire.send(_acks(tags, self._unsettled))

    def _unless_changed(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function`, made to do nothing if a delivery arrives or the subscriptions change before it is called."""
        changes = self._changes
        return lambda: function() if changes == self._changes else None

    def _cancelled(self, frame: pika.frame.Method[Any]) -> None:
        # The queue was deleted or lost its node: reconnect, which declares and subscribes again.
        queue = next((q for q, tags in self._tags.items() if frame.method.consumer_tag in tags), "a queue")
        _log.warning("%s: RabbitMQ cancelled the subscription to %s; subscribing again", self.name, queue)
        if self._connection is not None:
            with suppress(Exception):
                self._connection.close(320, "consumer cancelled")


def _down_to_first(names: Sequence[str], counts: Sequence[int]) -> Sequence[str]:
    """The lanes down to the first one that holds a message; all if none does."""
    first = next((n for n, count in enumerate(counts) if count), len(names))
    return names[: first + 1]


def _acks(tags: Sequence[int], unsettled: Iterable[int]) -> list[spec.Basic.Ack]:
    """The acks of these tags: one for all that lie below every unsettled one, and one for each of the others."""
    lowest = min(unsettled, default=None)
    together = [tag for tag in tags if lowest is None or tag < lowest]
    acks = [spec.Basic.Ack(max(together), multiple=len(together) > 1)] if together else []
    return acks + [spec.Basic.Ack(tag) for tag in tags if lowest is not None and tag > lowest]


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
