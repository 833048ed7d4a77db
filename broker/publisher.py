"""Publishing with confirms, pipelined: many messages on their way at once, each with its own answer."""

from __future__ import annotations

import asyncio
import itertools
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pika
from pika import spec
from pika.channel import Channel
from pika.exceptions import AMQPError

from broker.connection import BrokerThread
from broker.errors import BrokerUnavailable, PublishRejected, Unroutable
from broker.messages import Message
from broker.settings import BrokerSettings
from broker.topology import Topology
from schemas import InvalidTask

_WINDOW_LOOK_SECONDS = 0.002
"""How often an asyncio task looks for a place in a full window."""


_MAX_HEADER_BYTES = 64 * 1024
"""The largest properties that are sent: they have to fit into one frame, of 128 KiB by default."""


@dataclass(eq=False)
class _Pending:
    message: Message
    deadline: float
    properties: pika.BasicProperties
    returned: str | None = None
    sent: bool = False
    future: Future[None] = field(default_factory=Future)


class Publisher(BrokerThread):
    """Publishes persistent, mandatory messages and waits for the broker's confirm of each.

    Safe from many threads and from asyncio. At most `publish_window` messages are unconfirmed at a time.
    What a lost connection leaves unconfirmed is sent again on the next, so a message may arrive twice but
    is never dropped: its future either succeeds, once the broker has confirmed it, or raises

    - BrokerUnavailable: no confirm within the limit. Where the message had been sent, the broker may have it.
    - PublishRejected: the broker refused it.
    - Unroutable: no queue is bound for its routing key.
    """

    def __init__(self, settings: BrokerSettings, *, name: str, topology: Topology | None = None) -> None:
        super().__init__(settings, name=f"{name} publisher", topology=topology)
        self._window = threading.BoundedSemaphore(settings.publish_window)
        self._waiting: deque[_Pending] = deque()
        self._unconfirmed: dict[int, _Pending] = {}
        self._last_tag = 0
        self._wake_due = False
        self._gate = threading.Lock()
        self._closed = False
        self._blocked_since: float | None = None

    def publish(self, message: Message, *, timeout: float | None = None) -> Future[None]:
        """Send a message; the future resolves once the broker has confirmed it.

        Blocks while the window is full. `timeout` bounds, in seconds, the wait for a place and for the
        confirm together; the default is the setting `publish_timeout`.
        """
        pending = self._pending(message, timeout)
        if not self._window.acquire(timeout=max(0.0, pending.deadline - time.monotonic())):
            raise self._late("the publish window stayed full")
        return self._send(pending)

    async def confirm(self, message: Message, *, timeout: float | None = None) -> None:
        """Send a message and wait for its confirm, from asyncio. Raises what `publish` gives."""
        pending = self._pending(message, timeout)
        # A thread that waited for a place would take it even for a caller that has been cancelled.
        while not self._window.acquire(blocking=False):
            if time.monotonic() >= pending.deadline:
                raise self._late("the publish window stayed full")
            await asyncio.sleep(_WINDOW_LOOK_SECONDS)
        await asyncio.wrap_future(self._send(pending))

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to `timeout` seconds for what is unconfirmed, then close; the rest raises."""
        deadline = time.monotonic() + timeout
        while self._busy() and self.connected and time.monotonic() < deadline:
            time.sleep(0.01)
        super().close(timeout)
        with self._gate:
            self._closed = True
        self._fail_all(BrokerUnavailable("the publisher was closed before the broker confirmed"))

    def _busy(self) -> bool:
        return bool(self._waiting or self._unconfirmed)

    def _pending(self, message: Message, timeout: float | None) -> _Pending:
        if self._closing.is_set():
            raise BrokerUnavailable("the publisher is closed")
        limit = self._settings.publish_timeout if timeout is None else timeout
        return _Pending(message, time.monotonic() + limit, _sendable(message))

    def _send(self, pending: _Pending) -> Future[None]:
        # From here on the answer is ours to give: a caller's cancel cannot take the message back.
        pending.future.set_running_or_notify_cancel()
        with self._gate:
            if self._closed:
                self._window.release()
                raise BrokerUnavailable("the publisher is closed")
            self._waiting.append(pending)
        if not self._wake_due:
            self._wake_due = True
            if not self._call(self._drain):
                self._wake_due = False
        return pending.future

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
        channel = self._channel
        if channel is None or not channel.is_open or self._blocked_since is not None:
            return
        now = time.monotonic()
        while self._waiting:
            pending = self._waiting.popleft()
            if pending.deadline <= now:
                self._resolve(pending, self._late("the broker did not confirm in time"))
                continue
            message = pending.message
            self._last_tag += 1
            self._unconfirmed[self._last_tag] = pending
            pending.sent = True
            channel.basic_publish(
                message.exchange, message.routing_key, message.body, pending.properties, mandatory=True
            )

    def _returned(
        self,
        _channel: Channel,
        method: spec.Basic.Return,
        properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        # A return carries no delivery tag; it precedes the confirm of the message that it concerns.
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
        for confirmed in tags:
            pending = self._unconfirmed.pop(confirmed, None)
            if pending is None:
                continue
            message = pending.message
            where = f"exchange {message.exchange!r}, routing key {message.routing_key!r}"
            if isinstance(method, spec.Basic.Nack):
                self._resolve(
                    pending,
                    PublishRejected(
                        f"RabbitMQ refused message {message.message_id!r} ({where}): most likely "
                        "its queue is at its length limit; start more workers, or raise the limit"
                    ),
                )
            elif pending.returned is not None:
                advice = "run: inferq topology apply"
                self._resolve(
                    pending, Unroutable(f"no queue takes message {message.message_id!r} ({where}); {advice}")
                )
            else:
                self._resolve(pending, None)

    def _idle(self) -> None:
        now = time.monotonic()
        blocked = self._blocked_since
        too_long = blocked is not None and now - blocked > self._settings.amqp_blocked_limit
        self._expire(lambda pending: too_long or pending.deadline <= now)

    def _expire(self, due: Callable[[_Pending], bool]) -> None:
        for _ in range(len(self._waiting)):
            pending = self._waiting.popleft()
            if due(pending):
                after = " after it was sent once" if pending.sent else ""
                self._resolve(pending, self._late(f"the broker did not take the message in time{after}"))
            else:
                self._waiting.append(pending)
        now = time.monotonic()
        for tag, pending in list(self._unconfirmed.items()):
            # Sent and unanswered: its tag goes with it, so that a late answer finds nobody.
            if pending.deadline <= now:
                del self._unconfirmed[tag]
                self._resolve(pending, self._late("the broker did not confirm the message in time"))

    def _fail_all(self, error: BrokerUnavailable) -> None:
        while self._waiting:
            self._resolve(self._waiting.popleft(), error)
        while self._unconfirmed:
            self._resolve(self._unconfirmed.popitem()[1], error)

    def _resolve(self, pending: _Pending, error: Exception | None) -> None:
        if pending.future.done():
            return  # closing was faster
        self._window.release()
        if error is None:
            pending.future.set_result(None)
        else:
            pending.future.set_exception(error)


def _sendable(message: Message) -> pika.BasicProperties:
    """The message's properties, once it is sure that they can be sent.

    On the connection's thread it would be too late: what cannot be encoded there takes the connection down.
    """
    properties = message.properties()
    try:
        size = sum(len(part) for part in properties.encode())
        names = max(len(message.exchange.encode()), len(message.routing_key.encode()))
    except (ValueError, TypeError, struct.error, AMQPError) as error:
        raise InvalidTask(f"the message cannot be sent: {error}", code="unsendable") from error
    if size > _MAX_HEADER_BYTES or names > 255:
        raise InvalidTask(
            f"the message cannot be sent: its headers have {size} bytes, of at most {_MAX_HEADER_BYTES}, or "
            "its routing key has more than 255",
            code="unsendable",
        )
    return properties
