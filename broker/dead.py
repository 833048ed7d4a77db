"""Dead letters: read, redrive and purge them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, cast

import pika
from pika import spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ConnectionBlockedTimeout,
    NackError,
    UnroutableError,
)

from inferq.broker.connection import connect
from inferq.broker.errors import BrokerUnavailable, Unroutable
from inferq.broker.lanes import delivery_from
from inferq.broker.messages import DEAD_PREFIX, Delivery, named_id, redriven_message
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import dead_queue
from inferq.schemas import InferqError


class NoDeadLetters(InferqError):
    """The broker has no dead-letter queue of that task type."""

    code = "no_dead_letters"


@dataclass(frozen=True)
class DeadLetter:
    """A message in a dead-letter queue, and the reason."""

    delivery: Delivery
    task_id: str | None
    reason: str
    error: str
    attempts: int
    worker: str | None
    time: datetime | None

    @classmethod
    def of(cls, delivery: Delivery) -> DeadLetter:
        """Reads inferq's headers if a worker dead-lettered it, else those of RabbitMQ."""
        headers = delivery.headers

        def text(name: str) -> str | None:
            value = headers.get(f"{DEAD_PREFIX}{name}")
            return str(value) if value is not None else None

        reason = text("reason")
        error = text("error")
        if reason is None:
            reason = str(headers.get("x-first-death-reason") or "unknown")
            error = f"RabbitMQ dead-lettered the message ({reason}) from queue {headers.get('x-first-death-queue')!r}"
        attempts = headers.get(f"{DEAD_PREFIX}attempts")
        return cls(
            delivery=delivery,
            task_id=named_id(delivery),
            reason=reason,
            error=error or "",
            attempts=attempts if isinstance(attempts, int) else delivery.attempt,
            worker=text("worker"),
            time=_time(headers) or delivery.timestamp,
        )


def _time(headers: object) -> datetime | None:
    if not isinstance(headers, dict):
        return None
    text = headers.get(f"{DEAD_PREFIX}time")
    if isinstance(text, str):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    deaths = headers.get("x-death")
    if isinstance(deaths, list) and deaths and isinstance(deaths[0].get("time"), datetime):
        first: datetime = deaths[0]["time"]
        return first if first.tzinfo else first.replace(tzinfo=UTC)
    return None


_RETURN_SECONDS = 2.0
_FIRST_WINDOW, _LARGEST_WINDOW = 100, 10_000
"""Messages that RabbitMQ sends ahead of a reader that takes none. Each window is twice the one before it."""
_LOOK_SECONDS = 0.1
_SILENT_SECONDS = 10.0
"""Seconds without a message, although the queue has some, after which reading fails."""
_Received = tuple[spec.Basic.Deliver | spec.Basic.GetOk, pika.BasicProperties, bytes]
_UNKNOWN_TIME = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Filter:
    """Selects dead letters. A field that is None selects all. `since` is timezone-aware."""

    reason: str | None = None
    since: datetime | None = None
    task_id: str | None = None
    limit: int | None = None

    def matches(self, letter: DeadLetter) -> bool:
        return (
            (self.reason is None or letter.reason == self.reason)
            and (self.task_id is None or letter.task_id == self.task_id)
            and (self.since is None or (letter.time is not None and letter.time >= self.since))
        )


class DeadLetters:
    """The dead letters of one task type. Use as a context manager.

    Each call reads at most the messages that are in the queue when it starts, and stops at the limit. Those that it
    does not take stay in the queue, perhaps in another order. While a call reads, no other reader sees the messages
    that it has read. A limit takes the first ones; these are the oldest until the queue is first read. Raises
    BrokerUnavailable, and NoDeadLetters for a type without a queue.
    """

    def __init__(self, settings: BrokerSettings, type_name: str) -> None:
        self._settings = settings
        self._queue = dead_queue(type_name)
        self._type_name = type_name

    def __enter__(self) -> Self:
        self._connection = connect(self._settings, name="dead letters")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection.is_open:
            # In an alarm the broker does not answer; this must not hide the error that ended the command.
            with suppress(AMQPError):
                self._connection.close()
        if isinstance(error, ConnectionBlockedTimeout):
            raise BrokerUnavailable(
                f"RabbitMQ has blocked publishing for {self._settings.amqp_blocked_limit:g} s, in a memory or "
                "disk alarm; no dead letter is lost, but one that was redriven may still be in the queue; "
                "free memory or disk space on the broker, then run the command again"
            ) from error
        if isinstance(error, AMQPError):
            raise BrokerUnavailable(f"the connection to RabbitMQ was lost: {error!r}") from error

    def read(self, wanted: Filter = Filter()) -> list[DeadLetter]:
        """The matching dead letters, oldest first. They stay in the queue."""
        channel = self._open()
        found = list(self._matching(self._sent_ahead(channel), wanted))
        self._requeue_rest(channel, taken=0)
        return sorted(found, key=lambda letter: letter.time or _UNKNOWN_TIME)

    def redrive(self, wanted: Filter = Filter()) -> list[DeadLetter]:
        """Send the matching dead letters back to their work queues, as first attempts.

        Each one is published and confirmed before it is removed here. An interruption may leave it in both
        queues, which is harmless, but never in neither.
        """
        channel = self._open()
        channel.confirm_delivery()
        moved: list[DeadLetter] = []
        for letter in self._matching(self._one_by_one(channel), wanted):
            message = redriven_message(letter.delivery)
            try:
                channel.basic_publish(
                    message.exchange,
                    message.routing_key,
                    message.body,
                    message.properties(),
                    mandatory=True,
                )
            except UnroutableError as error:
                raise Unroutable(
                    f"no queue is bound for task {letter.task_id!r} (routing key {message.routing_key!r}); it stays "
                    f"a dead letter, {len(moved)} were redriven before it; run: inferq topology apply"
                ) from error
            except ConnectionBlockedTimeout:
                raise  # `__exit__` explains it; any call after the first publish may raise it
            except (NackError, AMQPError) as error:
                raise BrokerUnavailable(
                    f"RabbitMQ did not accept task {letter.task_id!r}: {error!r}; "
                    f"it stays a dead letter, {len(moved)} were redriven before it; run the command again"
                ) from error
            channel.basic_ack(letter.delivery.tag)
            moved.append(letter)
        self._requeue_rest(channel, taken=len(moved))
        return moved

    def purge(self, wanted: Filter = Filter()) -> list[DeadLetter]:
        """Delete the matching dead letters."""
        channel = self._open()
        gone: list[DeadLetter] = []
        for letter in self._matching(self._one_by_one(channel), wanted):
            channel.basic_ack(letter.delivery.tag)
            gone.append(letter)
        self._requeue_rest(channel, taken=len(gone))
        return gone

    def _open(self) -> BlockingChannel:
        channel = self._connection.channel()
        try:
            self._count = channel.queue_declare(self._queue, passive=True).method.message_count or 0
        except ChannelClosedByBroker as error:
            if error.reply_code != 404:
                raise BrokerUnavailable(
                    f"RabbitMQ refuses queue {self._queue!r}: {error.reply_text}"
                ) from error
            raise NoDeadLetters(
                f"the broker has no queue {self._queue!r}: no worker of type {self._type_name!r} ever "
                "ran there; check the type and INFERQ_AMQP_URL"
            ) from error
        return channel

    def _requeue_rest(self, channel: BlockingChannel, *, taken: int) -> None:
        """Requeue the messages that were read and not taken, and wait a moment until they are back.

        Otherwise the next reader, perhaps the same script, would find the queue empty.
        """
        channel.close()
        end = time.monotonic() + _RETURN_SECONDS
        left = self._count - taken
        channel = self._open()
        while self._count < left and time.monotonic() < end:
            time.sleep(0.005)
            self._count = channel.queue_declare(self._queue, passive=True).method.message_count or 0
        channel.close()

    def _matching(self, messages: Iterator[_Received], wanted: Filter) -> Iterator[DeadLetter]:
        if wanted.limit == 0:
            return
        found = 0
        for method, properties, body in messages:
            letter = DeadLetter.of(delivery_from(self._queue, 0, method, properties, body))
            if wanted.matches(letter):
                found += 1
                yield letter
                if found == wanted.limit:
                    return

    def _one_by_one(self, channel: BlockingChannel) -> Iterator[_Received]:
        """The messages, one round trip each: an interrupted command then holds back no message that it has not read."""
        for _ in range(self._count):
            method, properties, body = channel.basic_get(self._queue)
            if method is None or properties is None or body is None:
                return
            yield method, properties, cast(bytes, body)

    def _sent_ahead(self, channel: BlockingChannel) -> Iterator[_Received]:
        """The messages, sent by RabbitMQ in windows, without a round trip for each.

        The prefetch limit of a consumer bounds a window. The next window needs another consumer, because the
        messages stay unacknowledged.
        """
        received: deque[_Received] = deque()
        left, window = self._count, _FIRST_WINDOW
        while left > 0:
            channel.basic_qos(prefetch_count=window)
            channel.basic_consume(self._queue, lambda _, *message: received.append(message))
            for _ in range(min(window, left)):
                if not (received or self._arrives(channel, received)):
                    return
                yield received.popleft()
            left -= window
            window = min(2 * window, _LARGEST_WINDOW)

    def _arrives(self, channel: BlockingChannel, received: deque[_Received]) -> bool:
        """Wait for the next message; False if the queue has none left, since others read it too."""
        end = time.monotonic() + _SILENT_SECONDS
        empty = False
        while time.monotonic() < end:
            self._connection.process_data_events(_LOOK_SECONDS)  # type: ignore[arg-type]  # seconds, as a float
            if received or empty:
                return bool(received)
            # What was sent before this answer arrives before the next look ends.
            empty = not channel.queue_declare(self._queue, passive=True).method.message_count
        raise BrokerUnavailable(
            f"RabbitMQ has sent no message of queue {self._queue!r} for {_SILENT_SECONDS:g} s; run the command again"
        )
