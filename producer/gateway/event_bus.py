"""Live events: one Redis subscription connection, shared by all event streams and waiting requests."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from inferq.schemas import Event

_MAX_QUEUED_EVENTS = 256
_ACK_SECONDS = 1.0
_POLL_SECONDS = 1.0
_READ_SECONDS = 15.0
_RECONNECT_SECONDS = 0.5

_log = logging.getLogger(__name__)


class Subscription:
    """The events of one channel since it was opened."""

    def __init__(self, event_bus: EventBus, channel: str) -> None:
        self._bus = event_bus
        self._channel = channel
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(_MAX_QUEUED_EVENTS)

    async def next(self, seconds: float) -> Event | None:
        """The next event, or None if the caller has to poll.

        None comes after `seconds` (after at most one second while Redis is unavailable), and whenever events
        may have been lost.
        """
        if not self._bus.is_subscribed(self._channel):
            seconds = min(seconds, _POLL_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                return await self._events.get()
        except TimeoutError:
            return None

    def put(self, event: Event | None) -> None:
        if self._events.full():
            # A reader this far behind polls instead.
            while not self._events.empty():
                self._events.get_nowait()
            event = None
        self._events.put_nowait(event)


class EventBus:
    """Passes events from Redis' channels to the subscriptions of this process.

    Redis' publish/subscribe is lossy: after a lost connection every subscription has to poll.
    """

    def __init__(self, redis_url: str, *, timeout: float) -> None:
        # Without socket_keepalive, which a Unix socket has not: `_read` pings a silent connection.
        self._redis = redis.asyncio.Redis.from_url(
            redis_url, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._subscriptions: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._acked: dict[str, asyncio.Event] = {}
        self._pubsub: PubSub | None = None
        self._disconnected = False
        self._needed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._reader = asyncio.create_task(self._run(), name="events")

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
        await self._redis.aclose()

    def wake(self) -> None:
        """Make every subscription poll now."""
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.put(None)

    def is_subscribed(self, channel: str) -> bool:
        """Whether Redis has acknowledged the subscription of `channel`."""
        acked = self._acked.get(channel)
        return acked is not None and acked.is_set()

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncIterator[Subscription]:
        """Events of `channel` from now on; if Redis is unavailable, from when it is back."""
        subscription = Subscription(self, channel)
        self._subscriptions[channel].add(subscription)
        try:
            await self._subscribe(channel)
            yield subscription
        finally:
            self._subscriptions[channel].discard(subscription)
            if not self._subscriptions[channel]:
                del self._subscriptions[channel]
                # Often the caller is being cancelled; Redis has to be unsubscribed nevertheless.
                with anyio.move_on_after(_ACK_SECONDS, shield=True):
                    await self._unsubscribe(channel)

    async def _subscribe(self, channel: str) -> None:
        acked = self._acked.get(channel)
        if acked is None:
            acked = self._acked[channel] = asyncio.Event()
            if self._pubsub is not None:
                with suppress(RedisError, OSError):  # the reader gets the same error and reconnects
                    await self._pubsub.subscribe(channel)
            self._needed.set()
        if not self._disconnected:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ACK_SECONDS):
                    await acked.wait()

    async def _unsubscribe(self, channel: str) -> None:
        self._acked.pop(channel, None)
        if not self._subscriptions:
            self._needed.clear()
        if self._pubsub is not None:
            with suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(channel)

    async def _run(self) -> None:
        while True:
            await self._needed.wait()
            try:
                await self._listen()
            except Exception as error:
                level = logging.DEBUG if self._disconnected else logging.WARNING
                _log.log(
                    level,
                    "live events are unavailable, polling the object store instead: %s",
                    error,
                    exc_info=not isinstance(error, RedisError | OSError),
                )
                self._disconnected = True
            self.wake()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self) -> None:
        """Open a connection and read from it until it fails or is no longer needed."""
        async with self._redis.pubsub() as pubsub:
            try:
                if self._acked:
                    await pubsub.subscribe(*self._acked)
                    self._pubsub = pubsub
                    await self._read(pubsub)
            finally:
                # Before it is closed, as redis-py would reconnect it on use.
                self._pubsub = None
                for acked in self._acked.values():
                    acked.clear()

    async def _read(self, pubsub: PubSub) -> None:
        # Channels added while the connection was being made are not in the first subscribe.
        missed = [channel for channel in self._acked if channel.encode() not in pubsub.channels]
        if missed:
            await pubsub.subscribe(*missed)
        silent = False
        while True:
            message = await pubsub.get_message(timeout=_READ_SECONDS)
            if message is None:
                if silent:
                    raise redis.exceptions.ConnectionError(f"no answer to a ping for {_READ_SECONDS:g} s")
                silent = True
                await pubsub.ping()
                continue
            silent = False
            match message["type"]:
                case "subscribe":
                    if self._disconnected:
                        self._disconnected = False
                        self.wake()
                    if (acked := self._acked.get(message["channel"].decode())) is not None:
                        acked.set()
                case "message":
                    self._dispatch(message["channel"].decode(), message["data"])

    def _dispatch(self, channel: str, data: bytes) -> None:
        try:
            event = Event.model_validate_json(data)
        except ValidationError as error:
            _log.error("channel %s: a message is not an event: %s", channel, _places(error))
            return
        for subscription in self._subscriptions.get(channel, ()):
            subscription.put(event)


def _places(error: ValidationError) -> str:
    """The names of the wrong fields. Their values may be private."""
    return ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors(include_input=False))
