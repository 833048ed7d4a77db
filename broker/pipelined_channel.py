"""A channel that sends each method at once.

pika sends a method that has a reply only after the reply to the one before: each costs a round trip. RabbitMQ
answers the methods of one channel in the order in which it got them, so they may follow one another.
https://www.rabbitmq.com/docs/channels
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pika
from pika import amqp_object, spec
from pika.channel import Channel

from inferq.broker.connection import FrameConnection

OnMessage = Callable[[str, spec.Basic.Deliver, pika.BasicProperties, bytes], None]
"""Gets the consumer tag and the message."""
OnGet = Callable[[spec.Basic.GetOk, pika.BasicProperties, bytes], None]

_CANCELLED_TAGS = 64
"""The number of cancelled subscriptions whose late deliveries are still passed on."""


class PipelinedChannel:
    """Subscribes, counts and settles over `channel`, without waiting for replies.

    Nothing else may declare queues or consume on that channel. A delivery that arrives after the cancel of its
    subscription is passed on as well.
    """

    def __init__(self, connection: FrameConnection, channel: Channel) -> None:
        self._connection = connection
        self._channel = channel
        # What pika calls for a consumer tag. `basic_consume` would send only after the replies to earlier methods.
        self._consumers: dict[str, Callable[..., None]] = channel._consumers  # type: ignore[attr-defined]
        self._number = itertools.count(1)
        self._counting: deque[Callable[[int], None]] = deque()
        self._subscribing: dict[str, Callable[[], None]] = {}
        self._cancelled: deque[str] = deque()
        self._cancel_later: set[str] = set()
        self._on_empty: Callable[[], None] | None = None
        self.round_trip = 0.0
        """About how long a reply takes, in seconds; 0 before the first count."""
        channel.add_callback(self._counted, [spec.Queue.DeclareOk], one_shot=False)
        channel.add_callback(self._subscribed, [spec.Basic.ConsumeOk], one_shot=False)
        channel.add_callback(self._got_nothing, [spec.Basic.GetEmpty], one_shot=False)

    @property
    def is_open(self) -> bool:
        return self._channel.is_open

    def send(self, methods: Iterable[amqp_object.Method]) -> None:
        """Send methods that need no reply, in one write."""
        number = self._channel.channel_number
        self._connection.send_frames([pika.frame.Method(number, method).marshal() for method in methods])

    def consume(
        self,
        queue: str,
        on_message: OnMessage,
        *,
        arguments: Mapping[str, Any],
        then: Callable[[], None] | None = None,
    ) -> str:
        """Subscribe to a queue, and give the consumer tag. `then` is called with RabbitMQ's confirmation."""
        tag = f"{self._channel.channel_number}.{next(self._number)}"

        def deliver(
            _channel: Channel, method: spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes
        ) -> None:
            on_message(tag, method, properties, body)

        self._consumers[tag] = deliver
        if then is not None:
            self._subscribing[tag] = then
        self.send([spec.Basic.Consume(0, queue, tag, nowait=then is None, arguments=dict(arguments))])
        return tag

    def cancelling(self, tags: Sequence[str]) -> list[amqp_object.Method]:
        """The methods that cancel these subscriptions, for `send`.

        A subscription that is not confirmed yet is cancelled once it is: RabbitMQ 3.10 ends the whole connection with
        an internal error if the cancel overtakes its own confirmation.
        """
        self._cancel_later.update(tag for tag in tags if tag in self._subscribing)
        for tag in tags:
            self._cancelled.append(tag)
            if len(self._cancelled) > _CANCELLED_TAGS:
                self._consumers.pop(self._cancelled.popleft(), None)
        return [
            spec.Basic.Cancel(tag, nowait=True)  # type: ignore[arg-type]
            for tag in tags
            if tag not in self._cancel_later
        ]

    def count(
        self,
        queues: Sequence[str],
        then: Callable[[list[int]], None],
        *,
        before: Sequence[amqp_object.Method] = (),
    ) -> None:
        """Ask for the number of messages that wait in each of the queues: one round trip for all.

        It uses passive declarations, which the leader of a quorum queue answers from memory. The methods of `before`
        follow in the same write: the counts come before what they cause.
        """
        counts: list[int] = []
        began = time.monotonic()

        def counted(count: int) -> None:
            counts.append(count)
            if len(counts) == len(queues):
                # A reply may have waited until it was read, so the shorter time counts.
                elapsed = time.monotonic() - began
                self.round_trip = min(elapsed, 1.1 * (self.round_trip or elapsed))
                then(counts)

        self._counting.extend([counted] * len(queues))
        self.send([*(spec.Queue.Declare(queue=queue, passive=True) for queue in queues), *before])

    def get(self, queue: str, got: OnGet, empty: Callable[[], None]) -> None:
        """Take one message from a queue. One call at a time."""
        self._on_empty = empty
        self._channel.basic_get(queue, lambda _channel, *message: got(*message))

    def _counted(self, frame: pika.frame.Method[Any]) -> None:
        if self._counting:
            self._counting.popleft()(int(frame.method.message_count))

    def _subscribed(self, frame: pika.frame.Method[Any]) -> None:
        tag = str(frame.method.consumer_tag)
        then = self._subscribing.pop(tag, None)
        if tag in self._cancel_later:
            self._cancel_later.discard(tag)
            self.send(self.cancelling([tag]))
        if then is not None:
            then()

    def _got_nothing(self, _frame: object) -> None:
        on_empty, self._on_empty = self._on_empty, None
        if on_empty is not None:
            on_empty()
