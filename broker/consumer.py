"""Consumes from the lanes of one task type, the most urgent first: one delivery at a time, or a group of one lane.

What the working threads call. `lanes` decides which lane delivers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from inferq.broker.lanes import EARLY_SECONDS, Lanes
from inferq.broker.messages import Delivery

_LOW_SECONDS = 0.25
"""How long after its last delivery a consumer with the low priority keeps it."""

_NEAR_SECONDS = 0.005
"""A round trip up to which looking early would cost more than it saves, in seconds."""


class Consumer(Lanes):
    """Gives deliveries from `queues`, which lists the most urgent lane first.

    A subscription delivers up to `group` messages ahead of their acks. With a larger `window`, further deliveries are
    taken while some are in hand, `window` in all: the next group can be prepared meanwhile. `next` and `next_group`
    belong to one thread at a time; any thread may settle. None of these calls waits for the network, except for a
    delivery. RabbitMQ delivers to the free consumers of the highest `priority`, from LEAST_PRIORITY to 0. With
    `low_priority`, it delivers here only if no normal consumer is free.
    """

    def use_window(self, group: int, window: int) -> None:
        """Set how many deliveries a subscription brings, and how many may be in hand in all.

        Only before the first call of `next` or `next_group`, or after `pause` and before the next call.
        """
        self._group, self._window = group, max(group, window)
        self._perform(self._set_prefetch)

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
        self._low_priority = low_priority or self._stays_low
        self._wanted = self._accepting = more and not self._stopped.is_set()
        settling = self._begin_settling()

        def on_thread() -> None:
            wire, tags = self._open(deliveries)
            if not more or self._stopped.is_set():
                self._unsubscribe()
                if wire is not None and tags:
                    wire.send(self._acks(tags))
            elif wire is None or not tags:
                self._subscribe_all()
            else:
                self._ack_and_look(wire, tags)
            self._end_settling(settling)

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
            self._unsubscribe()
            self._nack(wire, tags)
            self._end_settling(settling)

        if not self._perform(on_thread):
            self._end_settling(settling)

    def look_early(self) -> None:
        """Look at the higher lanes now, for the next ack: call this when only storing is left to do.

        The ack then takes from a higher lane at once, a round trip sooner. A message that reaches a higher lane
        between this look and the ack is found by the look after: one group of a lower lane may pass it.
        """
        lane, wire = self._lane, self._wire
        if lane is None or wire is None or wire.round_trip <= _NEAR_SECONDS:
            return
        if lane > 0 or (self._window > 1 and self._is_drained(lane)):
            self._perform(self._look_early)

    def urgent_waits(self, queue: str) -> bool:
        """Whether a message waits in a lane above `queue`, by a look a moment ago. It begins the next look."""
        above = self._lanes[: self._lanes.index(queue)]
        if not above:
            return False

        def counted(counts: list[int]) -> None:
            self._urgent = {name for name, count in zip(above, counts, strict=True) if count}
            self._urgent_at = time.monotonic()

        def look() -> None:
            if self._wire is not None and self._wire.is_open:
                self._wire.count(above, counted)

        new = time.monotonic() - self._urgent_at < EARLY_SECONDS
        urgent = new and not self._urgent.isdisjoint(above)
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

        After an ack nothing is given out before the look at the higher lanes has ended: one of them may come first.
        """
        self._low_priority = low_priority or self._stays_low
        as_wanted = self._wanted and self._subscribed_low_priority == self._low_priority
        if self._window > 1 and self._unsettled:
            as_wanted = False  # it may be time for another lane
        if not self._inbox and not as_wanted and not self._stopped.is_set():
            self._wanted = self._accepting = True
            self._perform(self._subscribe_soon)
        while not self._may_give:
            left = end - time.monotonic()
            if left <= 0:
                return False
            if self._borrow(left, lambda: self._may_give):
                self._turn(limit=left)
        if self._unsent and self._borrow_again():
            self._unsent = False
            self._turn(limit=0)  # send the cancels of the other lanes before the task runs
        return True

    @property
    def _may_give(self) -> bool:
        return bool(self._inbox) and not self._settling and not self._deciding

    @property
    def _stays_low(self) -> bool:
        """Whether to go on with the low priority: a change subscribes anew, too much for each of many short tasks."""
        return self._subscribed_low_priority and time.monotonic() - self._taken_at < _LOW_SECONDS

    def _begin_settling(self) -> object:
        settling = object()
        with self._settled:
            self._settling.add(settling)
        return settling

    def _end_settling(self, settling: object) -> None:
        with self._settled:
            self._settling.discard(settling)
            self._settled.notify_all()
        self._notice()

    def _perform(self, function: Callable[[], None]) -> bool:
        """Run `function` here if this thread has borrowed the loop, else on the connection's thread."""
        if self._borrow_again():
            self._turn(function, limit=0)
            return True
        return self._call(function)
