"""Live events: one Redis subscription connection shared by every event stream and every waiting request."""

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

_QUEUED_EVENTS = 256
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
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(_QUEUED_EVENTS)

    async def next(self, seconds: float) -> Event | None:
        """The next event; None when it is time to look for oneself.

        That is after `seconds` (after at most one, while Redis is away), and whenever events may have
        been missed.
        """
        if not self._bus.hears(self._channel):
            seconds = min(seconds, _POLL_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                return await self._events.get()
        except TimeoutError:
            return None

    def put(self, event: Event | None) -> None:
        if self._events.full():
            # A reader this far behind is better served by where the task stands now.
            while not self._events.empty():
                self._events.get_nowait()
            event = None
        self._events.put_nowait(event)


class EventBus:
    """Hands the events of Redis' channels to the subscriptions of this process.

    Redis' publish/subscribe is lossy: after a lost connection each subscription is told to look for itself.
    """

    def __init__(self, redis_url: str, *, timeout: float) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            redis_url,
            socket_connect_timeout=timeout,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
        )
        self._subscriptions: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._acked: dict[str, asyncio.Event] = {}
        self._pubsub: PubSub | None = None
        self._away = False
        self._wanted = asyncio.Event()
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
        """Have every subscription look for itself now."""
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.put(None)

    def hears(self, channel: str) -> bool:
        """Whether Redis has acknowledged the subscription of `channel`."""
        acked = self._acked.get(channel)
        return acked is not None and acked.is_set()

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncIterator[Subscription]:
        """Events of `channel` from now on; where Redis is away, from when it is back."""
        subscription = Subscription(self, channel)
        self._subscriptions[channel].add(subscription)
        try:
            await self._listen_to(channel)
            yield subscription
        finally:
            self._subscriptions[channel].discard(subscription)
            if not self._subscriptions[channel]:
                del self._subscriptions[channel]
                # Whoever leaves is often being cancelled, and Redis has to be told all the same.
                with anyio.move_on_after(_ACK_SECONDS, shield=True):
                    await self._forget(channel)

    async def _listen_to(self, channel: str) -> None:
        acked = self._acked.get(channel)
        if acked is None:
            acked = self._acked[channel] = asyncio.Event()
            if self._pubsub is not None:
                with suppress(RedisError, OSError):  # the reader meets the same error and mends it
                    await self._pubsub.subscribe(channel)
            self._wanted.set()
        if not self._away:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ACK_SECONDS):
                    await acked.wait()

    async def _forget(self, channel: str) -> None:
        self._acked.pop(channel, None)
        if not self._subscriptions:
            self._wanted.clear()
        if self._pubsub is not None:
            with suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(channel)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                await self._listen()
            except (RedisError, OSError) as error:
                level = logging.DEBUG if self._away else logging.WARNING
                _log.log(level, "live events are away, the object store is asked instead: %s", error)
                self._away = True
            except Exception:
                _log.exception("live events met an error")
            self.wake()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self) -> None:
        """One connection's life, from its first subscription to its end."""
        async with self._redis.pubsub() as pubsub:
            try:
                if self._acked:
                    await pubsub.subscribe(*self._acked)
                    self._pubsub = pubsub
                    await self._read(pubsub)
            finally:
                # Before it is closed nobody must use it any more: redis-py would connect it again.
                self._pubsub = None
                for acked in self._acked.values():
                    acked.clear()

    async def _read(self, pubsub: PubSub) -> None:
        # Channels that were wanted while the connection was being made have missed the first subscribe.
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
                    if self._away:
                        self._away = False
                        self.wake()
                    if (acked := self._acked.get(message["channel"].decode())) is not None:
                        acked.set()
                case "message":
                    self._hand_out(message["channel"].decode(), message["data"])

    def _hand_out(self, channel: str, data: bytes) -> None:
        try:
            event = Event.model_validate_json(data)
        except ValidationError as error:
            _log.error("channel %s carries something that is no event: %s", channel, error)
            return
        for subscription in self._subscriptions.get(channel, ()):
            subscription.put(event)
