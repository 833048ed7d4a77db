"""The lanes of a consumer, on the connection's thread: which one delivers, and when a higher one is asked.

An idle consumer subscribes to all its lanes. The first delivery cancels the subscriptions of the other lanes, and the
subscription that stays brings up to `group` deliveries. With the acks the consumer asks the higher lanes for their
message counts, in the same write: the counts arrive before what the acks admit, and nothing is given out before that.
If a higher lane holds a message, the consumer takes it and requeues what it has not given out. A delivery of another
lane that arrives meanwhile is requeued at once. With one lane, prefetch does all this.
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

EARLY_SECONDS = 1.0
"""How old the answer of an early look may be when the ack uses it."""


class Lanes(BrokerThread):
    """Fills an inbox from the lanes, and settles what was taken from it.

    Its methods run on the thread that turns the connection's loop. The working threads' side is `Consumer`.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        queues: Sequence[str],
        *,
        name: str,
        topology: Topology | None = None,
        priority: int = 0,
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
        self._low_priority = self._subscribed_low_priority = False
        self._wire: PipelinedChannel | None = None
        self._inbox: deque[Delivery] = deque()  # all of one lane
        self._unsettled: dict[int, int] = {}  # the lane of each delivery tag in hand or in the inbox
        self._epoch = 0
        self._tags: dict[str, list[str]] = {}  # the subscriptions of each lane
        self._brought: dict[int, str] = {}  # the subscription of each delivery that is not settled
        self._wanted = False  # a thread waits for a delivery, and none has come
        self._accepting = False  # the last call that decides it asked for more
        self._lane: int | None = None  # the lane that delivers; None: the first one that does
        self._backlog: dict[str, int] = {}  # the messages that waited in each lane at its last count
        self._on_the_way = 0  # deliveries of the lane that its last count did not include
        self._counted_at = float("-inf")  # when all lanes were counted
        self._cancelled_in: dict[
            str, int
        ] = {}  # the change that cancelled a lane, until RabbitMQ has read it
        self._uncertain: set[str] = set()  # lanes whose count may not include a message
        self._changes = 0
        self._looking = False  # at the counts of the higher lanes
        self._deciding = False  # whether a higher lane comes next: nothing is given out meanwhile
        self._looked_at = float("-inf")  # when an early look began whose answer no ack has used
        self._urgent_at = float("-inf")
        self._urgent: set[str] = set()  # the lanes that held messages when `urgent_waits` last looked
        self._taken_at = float("-inf")
        self._unsent = False
        self._idle_since: float | None = None
        self._stopped = threading.Event()
        self._settled = threading.Condition()
        self._settling: set[object] = set()

    def _opened(self, channel: Channel) -> None:
        assert self._connection is not None  # noqa: S101
        self._epoch += 1
        self._forget()
        with self._settled:
            # What was settled before is void, also if the attempt to connect failed before it was looked at.
            self._settling.clear()
            self._settled.notify_all()
        channel.add_on_cancel_callback(self._cancelled)
        self._wire = PipelinedChannel(self._connection, channel)
        self._set_prefetch()
        if self._wanted:
            self._subscribe_all()

    def _set_prefetch(self) -> None:
        """For the subscriptions that follow: pika would send it after them, if it waits for a reply."""
        if self._wire is not None and self._wire.is_open:
            self._wire.send([spec.Basic.Qos(prefetch_count=self._group)])

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
        self._backlog.clear()
        self._counted_at = float("-inf")
        self._cancelled_in.clear()
        self._uncertain.clear()
        self._urgent.clear()
        self._lane = self._idle_since = None
        self._looked_at = float("-inf")
        self._looking = self._deciding = False
        self._changes += 1

    def _open(self, deliveries: Sequence[Delivery]) -> tuple[PipelinedChannel | None, list[int]]:
        """The channel, and the tags of those deliveries that can be settled; all others are redelivered."""
        wire = self._wire
        if wire is None or not wire.is_open:
            return None, []
        mine = {d.tag: None for d in deliveries if d.epoch == self._epoch and d.tag in self._unsettled}
        return wire, list(mine)

    # Subscribing.

    def _subscribe_soon(self) -> None:
        """Subscribe to the other lanes, but give the lane in hand time to deliver if it may hold more.

        Usually the same lane delivers next; subscribing to all lanes first would delay that.
        """
        wire, lane = self._wire, self._lane
        as_wanted = self._subscribed_low_priority == self._low_priority or self._window == self._group
        if wire is None or lane is None or not as_wanted or not self._delivers(self._lanes[lane]):
            self._subscribe_all()
            return
        if not self._is_drained(lane):
            wait = max(_SETTLE_SECONDS, 2 * wire.round_trip)
            self._later(wait, self._unless_changed(self._subscribe_all))
        elif self._counted_at > time.monotonic() - EARLY_SECONDS:
            self._subscribe_all()
        else:
            self._count(wire, self._lanes, self._unless_changed(self._subscribe_soon))

    def _is_drained(self, lane: int) -> bool:
        """Whether it seems that nothing waits in a lane, but in a lower one."""
        own, *below = (self._backlog.get(name, 0) for name in self._lanes[lane:])
        return own <= 0 and any(below)

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
        missing = [name for name in self._lanes if not self._delivers(name)]
        if not missing:
            if self._idle_since is None and not self._unsettled:
                self._idle_since = time.monotonic()
        elif len(missing) == 1 or self._counted_at > time.monotonic() - EARLY_SECONDS:
            self._subscribe(wire, self._down_to_first(missing))
        else:
            self._changes += 1
            go_on = self._unless_changed(lambda: self._subscribe(wire, self._down_to_first(missing)))
            self._count(wire, missing, go_on)

    def _count(
        self,
        wire: PipelinedChannel,
        names: Sequence[str],
        then: Callable[[], None],
        *,
        before: Sequence[amqp_object.Method] = (),
    ) -> None:
        """Count the messages in these lanes and then go on."""
        began = time.monotonic()

        def counted(counts: list[int]) -> None:
            self._backlog.update(zip(names, counts, strict=True))
            if len(names) == len(self._lanes):
                self._counted_at = began
            lane = self._lane
            if (
                lane is not None
                and (tags := self._tags.get(self._lanes[lane]))
                and self._lanes[lane] in names
            ):
                # If messages wait in spite of the subscription, it has brought as many as it may.
                held = sum(each == lane for each in self._unsettled.values())
                self._on_the_way = max(0, self._group * len(tags) - held)
            then()

        wire.count(names, counted, before=before)

    def _down_to_first(self, names: Sequence[str]) -> Sequence[str]:
        """The lanes down to the first one that holds a message; all if none does."""
        first = next((n for n, name in enumerate(names) if self._backlog.get(name)), len(names))
        return names[: first + 1]

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
        if self._lane is None or names != [self._lanes[self._lane]]:
            self._lane = None
        self._uncertain.difference_update(names)
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
                self._uncertain.add(name)
                self._nack(self._wire, [_tag(method)])
            else:
                self._brought[_tag(method)] = consumer_tag
                self._take(lane, delivery_from(name, epoch, method, properties, body))

        return deliver

    def _take(self, lane: int, delivery: Delivery) -> None:
        """Put a delivery into the inbox. The first one of its lane cancels the subscriptions of the others."""
        self._unsettled[delivery.tag] = lane
        self._inbox.append(delivery)
        self._taken_at = time.monotonic()
        self._notice()
        if self._on_the_way > 0 and lane == self._lane:
            self._on_the_way -= 1
        else:
            self._backlog[delivery.queue] = max(0, self._backlog.get(delivery.queue, 0) - 1)
        self._changes += 1
        self._wanted = False
        self._idle_since = None
        if lane == self._lane:
            return
        self._lane, self._on_the_way, self._looked_at = lane, 0, float("-inf")
        self._urgent.discard(delivery.queue)
        others = [name for name in self._tags if name != delivery.queue]
        if others and self._wire is not None:
            self._wire.send(self._cancelling(self._wire, others))
            self._unsent = True
            if above := [name for name in others if name in self._lanes[:lane]]:
                self._await_cancel(self._wire, above)

    def _await_cancel(self, wire: PipelinedChannel, names: Sequence[str]) -> None:
        """Find out when RabbitMQ has read the cancels: a delivery that it sent before comes before the next count."""
        change = self._changes
        self._cancelled_in.update(dict.fromkeys(names, change))

        def read(_counts: list[int]) -> None:
            for name in names:
                if self._cancelled_in.get(name) == change:
                    del self._cancelled_in[name]

        wire.count(names[:1], read)

    def _cancelling(self, wire: PipelinedChannel, names: Sequence[str]) -> list[amqp_object.Method]:
        return wire.cancelling([tag for name in names for tag in self._tags.pop(name)])

    def _unsubscribe(self) -> None:
        wire = self._wire
        if wire is None or not wire.is_open:
            return
        self._changes += 1
        self._lane = self._idle_since = None
        self._looked_at = float("-inf")
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
        wire = self._wire
        if wire is None or not wire.is_open or self._lane is None or self._looking or self._deciding:
            return
        self._look(wire, [])

    def _look(self, wire: PipelinedChannel, acks: Sequence[amqp_object.Method]) -> None:
        """Count the messages above; in groups, in all lanes, since that tells where to go on if this one is empty."""
        began = time.monotonic()

        def looked() -> None:
            self._looking = False
            if self._deciding:
                self._get_from(wire)
            else:
                self._looked_at = began

        self._looking = True
        self._uncertain.update(self._cancelled_in)
        self._count(wire, self._lanes if self._window > 1 else self._lanes[: self._lane], looked, before=acks)

    def _ack_and_look(self, wire: PipelinedChannel, tags: Sequence[int]) -> None:
        """Send the acks, and ask the higher lanes for messages unless an early look has."""
        if self._subscribed_low_priority != self._low_priority:
            self._unsubscribe()  # before the acks admit the next delivery
        acks = self._acks(tags)
        if self._deciding or not self._lane:
            wire.send(acks)
            if not self._deciding:
                self._go_on()
            return
        self._deciding = True
        looked_at, self._looked_at = self._looked_at, float("-inf")
        if self._looking:
            wire.send(acks)
        elif looked_at > time.monotonic() - EARLY_SECONDS:
            self._get_from(wire)
            wire.send(acks)
        else:
            self._look(wire, acks)

    def _get_from(self, wire: PipelinedChannel, first: int = 0) -> None:
        """Take a message from the highest lane that has one, unless another worker is faster.

        A lane that sent a message which we requeued, or may have sent one, is asked by `basic.get`: the count may not
        yet show that message. `basic.get` writes a command to the queue's log, so the others are not asked by it.
        """
        names = self._lanes
        above = next(
            (
                lane
                for lane in range(first, self._lane or 0)
                if self._backlog.get(names[lane]) or names[lane] in self._uncertain
            ),
            None,
        )
        if above is None:
            self._deciding = False
            self._notice()
            self._go_on()
            return
        name, epoch = names[above], self._epoch
        self._uncertain.discard(name)

        def got(method: spec.Basic.GetOk, properties: pika.BasicProperties, body: bytes) -> None:
            self._deciding = False
            self._notice()
            if not self._accepting:
                self._nack(wire, [_tag(method)])
                return
            self._requeue_inbox()
            self._take(above, delivery_from(name, epoch, method, properties, body))
            if self._group > 1:
                self._subscribe(wire, [name])

        wire.get(name, got, lambda: self._get_from(wire, above + 1))

    def _go_on(self) -> None:
        """After acks: wait in the lane, or subscribe to the others."""
        if self._inbox:
            return
        if len(self._lanes) > 1:
            self._subscribe_soon()
        else:
            self._subscribe_all()

    def _acks(self, tags: Sequence[int]) -> list[spec.Basic.Ack]:
        for tag in tags:
            del self._unsettled[tag]
            self._brought.pop(tag, None)
        return _acks(tags, self._unsettled)

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
