"""Publishes with pipelined confirms: many messages in flight, each with its own result."""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pika
from pika import spec
from pika.channel import Channel
from pika.exceptions import AMQPError

from inferq.broker.connection import BrokerThread
from inferq.broker.errors import BrokerUnavailable, PublishRejected, Unroutable
from inferq.broker.messages import Message
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import Topology
from inferq.schemas import InvalidTask

_MAX_HEADER_BYTES = 64 * 1024
"""The largest properties: they must fit into one frame, 128 KiB by default."""

_FRAME = struct.Struct(">BHI")
_CONTENT = struct.Struct(">HxxQ")
_END = bytes([spec.FRAME_END])
_KEPT_METHODS = 1000

_log = logging.getLogger(__name__)

_BURST_BYTES = 256 * 1024
"""Bytes given to the connection at a time."""

_REDECLARE_SECONDS = 5.0
"""The least time between two declarations of the topology after unroutable messages."""


@dataclass(eq=False)
class _Answer:
    """A caller's result: the confirms of `left` messages, or the first error among them."""

    left: int
    error: Exception | None = None
    future: Future[None] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _Pending:
    message: Message
    deadline: float
    encoded: bytes
    answer: _Answer
    returned: str | None = None
    sent: bool = False
    settled: bool = False


class _Window:
    """Limits the messages in flight."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._changed = threading.Condition()
        self._waiting: deque[Future[None]] = deque()

    def acquire(self, most: int, timeout: float = 0.0) -> int:
        """Reserve up to `most` slots and return their number; 0 if none is free within `timeout` seconds."""
        with self._changed:
            if not self._free:
                self._changed.wait_for(lambda: self._free, timeout)
            taken = min(most, self._free)
            self._free -= taken
            return taken

    async def acquire_one(self, timeout: float) -> bool:
        """Reserve a slot from asyncio; False if none is free within `timeout` seconds. First come, first served."""
        slot: Future[None] = Future()
        with self._changed:
            if self._free:
                self._free -= 1
                return True
            self._waiting.append(slot)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wrap_future(slot)
        except (TimeoutError, asyncio.CancelledError) as error:
            with self._changed:
                granted = not slot.cancel()
            if granted:  # just as the caller gave up
                self.release(1)
            if isinstance(error, asyncio.CancelledError):
                raise
            return False
        return True

    def release(self, count: int) -> None:
        with self._changed:
            while count and self._waiting:
                slot = self._waiting.popleft()
                if slot.set_running_or_notify_cancel():
                    slot.set_result(None)
                    count -= 1
            self._free += count
            self._changed.notify(count)


class Publisher(BrokerThread):
    """Publishes persistent, mandatory messages and waits for the broker's confirm of each.

    Safe from many threads and from asyncio. At most `publish_window` messages are unconfirmed at a time.
    Unconfirmed messages of a lost connection are sent again on the next one. A message may arrive twice, but is
    never dropped: its future succeeds once the broker has confirmed it, or raises

    - BrokerUnavailable: no confirm within the limit. If the message was sent, the broker may have it.
    - PublishRejected: the broker refused it.
    - Unroutable: no queue is bound for its routing key. Someone may have deleted the queue, so the publisher declares
      its topology again; publish the message again.
    """

    def __init__(self, settings: BrokerSettings, *, name: str, topology: Topology | None = None) -> None:
        super().__init__(settings, name=f"{name} publisher", topology=topology)
        self._window = _Window(settings.publish_window)
        self._waiting: deque[_Pending] = deque()
        self._unconfirmed: dict[int, _Pending] = {}
        self._last_tag = 0
        self._wake_due = False
        self._gate = threading.Lock()
        self._closed = False
        self._blocked_since: float | None = None
        self._methods: dict[tuple[int, str, str], bytes] = {}
        self._declare_after = 0.0

    def publish(self, message: Message, *, timeout: float | None = None) -> Future[None]:
        """Send a message; the future resolves once the broker has confirmed it.

        Blocks while the window is full. `timeout` limits, in seconds, the wait for the window and the confirm
        together; the default is the setting `publish_timeout`.
        """
        return self.publish_all([message], timeout=timeout)

    def publish_all(self, messages: Sequence[Message], *, timeout: float | None = None) -> Future[None]:
        """Send messages; the future resolves once the broker has confirmed them all.

        Cheaper than `publish` for each: one wake-up of the connection, one future. If some messages fail, the
        future raises an error once all are answered: PublishRejected, with the refused messages, only if all
        others are confirmed. Blocks while the window is full. Raises InvalidTask for a message that cannot be
        sent, and then sends none.
        """
        answer = _Answer(len(messages))
        deadline = self._deadline(timeout)
        burst = [_Pending(message, deadline, _sendable(message), answer) for message in messages]
        if not burst:
            answer.future.set_result(None)
            return answer.future
        # From here on a caller cannot cancel the future: the messages cannot be taken back.
        answer.future.set_running_or_notify_cancel()
        begun = 0
        while begun < len(burst):
            # Send what has a slot before waiting for more slots: its confirms free them.
            places = self._window.acquire(len(burst) - begun, max(0.0, deadline - time.monotonic()))
            if not places:
                late = self._late("the publish window stayed full")
                if begun == 0:
                    raise late
                self._settle(burst[begun:], late)
                break
            self._send(burst[begun : begun + places])
            begun += places
        return answer.future

    async def confirm(self, message: Message, *, timeout: float | None = None) -> None:
        """Send a message and wait for its confirm, from asyncio. Raises what `publish` gives."""
        pending = _Pending(message, self._deadline(timeout), _sendable(message), _Answer(1))
        # Not on a thread: it would take the slot even after the caller is cancelled.
        if not await self._window.acquire_one(pending.deadline - time.monotonic()):
            raise self._late("the publish window stayed full")
        pending.answer.future.set_running_or_notify_cancel()
        self._send([pending])
        await asyncio.wrap_future(pending.answer.future)

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to `timeout` seconds for confirms, then close. Unconfirmed messages raise."""
        deadline = time.monotonic() + timeout
        while self._busy() and self.connected and time.monotonic() < deadline:
            time.sleep(0.01)
        super().close(timeout)
        with self._gate:
            self._closed = True
        late = BrokerUnavailable("the publisher was closed before the broker confirmed")
        self._resolve([*self._waiting, *self._unconfirmed.values()], late)
        self._waiting.clear()
        self._unconfirmed.clear()

    def _busy(self) -> bool:
        return bool(self._waiting or self._unconfirmed)

    def _deadline(self, timeout: float | None) -> float:
        if self._closing.is_set():
            raise BrokerUnavailable("the publisher is closed")
        return time.monotonic() + (self._settings.publish_timeout if timeout is None else timeout)

    def _send(self, burst: Sequence[_Pending]) -> None:
        """Queue messages that have slots in the window for sending."""
        with self._gate:
            if self._closed:
                self._window.release(len(burst))
                raise BrokerUnavailable("the publisher is closed")
            self._waiting.extend(burst)
        if not self._wake_due:
            self._wake_due = True
            if not self._call(self._drain):
                self._wake_due = False

    def _late(self, what: str) -> BrokerUnavailable:
        if self.blocked_reason is not None:
            what = f"RabbitMQ blocks publishing ({self.blocked_reason})"
        elif self.last_error is not None:
            what = self.last_error.message
        return BrokerUnavailable(what)

    # On the connection's thread.

    def _opened(self, channel: Channel) -> None:
        self._last_tag = 0
        channel.add_on_return_callback(self._returned)
        channel.confirm_delivery(self._confirmed, callback=lambda _frame: self._drain())

    def _lost(self) -> None:
        for pending in reversed(self._unconfirmed.values()):
            pending.returned = None
            self._waiting.appendleft(pending)
        self._unconfirmed.clear()
        self._blocked_since = None

    def _blocked(self) -> None:
        self._blocked_since = time.monotonic()

    def _unblocked(self) -> None:
        self._blocked_since = None
        self._drain()

    def _drain(self) -> None:
        self._wake_due = False
        channel, connection = self._channel, self._connection
        if channel is None or connection is None or not channel.is_open or self._blocked_since is not None:
            return
        one_frame = connection.largest_payload
        now = time.monotonic()
        frames: list[bytes] = []
        size = 0
        while self._waiting:
            pending = self._waiting.popleft()
            if pending.deadline <= now:
                self._resolve([pending], self._late("the broker did not confirm in time"))
                continue
            message = pending.message
            self._last_tag += 1
            self._unconfirmed[self._last_tag] = pending
            pending.sent = True
            if len(message.body) <= one_frame:
                framed = self._framed(channel, pending)
                frames.append(framed)
                size += len(framed)
            if size > _BURST_BYTES or len(message.body) > one_frame:
                connection.send_frames(frames)
                frames, size = [], 0
            if len(message.body) > one_frame:
                channel.basic_publish(
                    message.exchange, message.routing_key, message.body, message.properties(), mandatory=True
                )
        connection.send_frames(frames)

    def _framed(self, channel: Channel, pending: _Pending) -> bytes:
        """The frames of pika's basic_publish, from parts encoded in advance; for one body frame."""
        number, message = channel.channel_number, pending.message
        where = (number, message.exchange, message.routing_key)
        method = self._methods.get(where)
        if method is None:
            if len(self._methods) >= _KEPT_METHODS:
                self._methods.clear()
            publish = spec.Basic.Publish(
                exchange=message.exchange, routing_key=message.routing_key, mandatory=True
            )
            method = self._methods[where] = pika.frame.Method(number, publish).marshal()
        body = message.body
        header = _CONTENT.pack(spec.BasicProperties.INDEX, len(body)) + pending.encoded
        parts = [method, _FRAME.pack(spec.FRAME_HEADER, number, len(header)), header, _END]
        if body:
            parts += [_FRAME.pack(spec.FRAME_BODY, number, len(body)), body, _END]
        return b"".join(parts)

    def _returned(
        self,
        _channel: Channel,
        method: spec.Basic.Return,
        properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        # A return has no delivery tag; it precedes the confirm of its message.
        for pending in self._unconfirmed.values():
            message = pending.message
            if pending.returned is None and (message.exchange, message.routing_key, message.message_id) == (
                method.exchange,
                method.routing_key,
                properties.message_id,
            ):
                pending.returned = method.reply_text
                return

    def _confirmed(self, frame: pika.frame.Method[Any]) -> None:
        method = frame.method
        tag = method.delivery_tag
        tags = [tag]
        if method.multiple:
            tags = list(itertools.takewhile(lambda unconfirmed: unconfirmed <= tag, self._unconfirmed))
        taken: list[_Pending] = []
        for answered in tags:
            pending = self._unconfirmed.pop(answered, None)
            if pending is None:
                continue
            if isinstance(method, spec.Basic.Ack) and pending.returned is None:
                taken.append(pending)
                continue
            message = pending.message
            what = (
                f"message {message.message_id!r} (exchange {message.exchange!r}, routing key "
                f"{message.routing_key!r})"
            )
            if isinstance(method, spec.Basic.Nack):
                error: Exception = PublishRejected(
                    f"RabbitMQ refused {what}: most likely its queue is at its length limit; start more "
                    "workers, or raise the limit",
                    refused=[message],
                )
            else:
                error = Unroutable(f"no queue takes {what}; run: inferq topology apply")
                self._redeclare()
            self._resolve([pending], error)
        self._resolve(taken, None)

    def _redeclare(self) -> None:
        """Declare the topology again, at times. A user without the right to declare would lose the connection."""
        channel, now = self._channel, time.monotonic()
        if self._topology is None or self._only_check or channel is None or now < self._declare_after:
            return
        self._declare_after = now + _REDECLARE_SECONDS
        _log.warning("%s: a queue is missing; declaring all queues again", self.name)
        self._topology.declare(channel, lambda: None)

    def _idle(self) -> None:
        now = time.monotonic()
        blocked = self._blocked_since
        too_long = blocked is not None and now - blocked > self._settings.amqp_blocked_limit
        for _ in range(len(self._waiting)):
            pending = self._waiting.popleft()
            if too_long or pending.deadline <= now:
                after = " after it was sent once" if pending.sent else ""
                self._resolve([pending], self._late(f"the broker did not take the message in time{after}"))
            else:
                self._waiting.append(pending)
        for tag, pending in list(self._unconfirmed.items()):
            # Forget the tag, too, so that a late confirm is ignored.
            if pending.deadline <= now:
                del self._unconfirmed[tag]
                self._resolve([pending], self._late("the broker did not confirm the message in time"))

    def _resolve(self, burst: Sequence[_Pending], error: Exception | None) -> None:
        """Resolve messages that have slots in the window."""
        self._window.release(self._settle(burst, error))

    def _settle(self, burst: Sequence[_Pending], error: Exception | None) -> int:
        """Resolve each message once; return how many were still open, since closing may have been faster."""
        settled = 0
        answered: list[_Answer] = []
        with self._gate:
            for pending in burst:
                if pending.settled:
                    continue
                pending.settled = True
                settled += 1
                answer = pending.answer
                answer.left -= 1
                if isinstance(error, PublishRejected) and isinstance(answer.error, PublishRejected):
                    answer.error.refused += error.refused
                # Of several kinds of errors, one that leaves the other messages in doubt counts.
                elif answer.error is None or isinstance(answer.error, PublishRejected):
                    answer.error = error or answer.error
                if answer.left == 0:
                    answered.append(answer)
        for answer in answered:
            if answer.error is None:
                answer.future.set_result(None)
            else:
                answer.future.set_exception(answer.error)
        return settled


@lru_cache(1024)
def _longest_name(exchange: str, routing_key: str) -> int:
    return max(len(exchange.encode()), len(routing_key.encode()))


def _sendable(message: Message) -> bytes:
    """The message's encoded properties. Raises InvalidTask for a message that cannot be sent.

    An encoding error on the connection's thread would lose the connection.
    """
    try:
        encoded = message.encoded_properties()
        size = len(encoded)
        names = _longest_name(message.exchange, message.routing_key)
    except (ValueError, TypeError, struct.error, AMQPError) as error:
        raise InvalidTask(f"the message cannot be sent: {error}", code="unsendable") from error
    if size > _MAX_HEADER_BYTES or names > 255:
        raise InvalidTask(
            f"the message cannot be sent: its headers have {size} bytes (limit {_MAX_HEADER_BYTES}), or its "
            "routing key has more than 255",
            code="unsendable",
        )
    return encoded
