"""What RabbitMQ tells over AMQP alone: messages and consumers of each queue, and whether it blocks publishers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pika
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ChannelWrongStateError,
    ConnectionBlockedTimeout,
)

from inferq.broker import RETRY_LEVELS, BrokerSettings, BrokerUnavailable, connect, dead_queue, work_queue
from inferq.broker.topology import DELAY_LEVELS, UNROUTABLE, delay_level, retry_exchange
from inferq.schemas import PRIORITIES
from inferq.schemas.monitor import Alarm

ALARM_EXCHANGE = "amq.headers"
"""Every virtual host has it, and nothing of inferq is bound to it: a message without headers is dropped."""

CALLBACKS_QUEUE = "inference.callbacks"
DELAY_QUEUES = tuple(delay_level(level) for level in range(DELAY_LEVELS))

_DELAYS_EVERY = 6
"""The delay levels are half of all queues, and change slowly: they are read once in so many readings."""
_BLOCKED_SECONDS = 0.5
_LISTEN_SECONDS = 0.2
"""How long the broker may take to say that it blocks a connection; otherwise the next round hears it."""
_MISSING = 404

_log = logging.getLogger(__name__)


class QueueCount(NamedTuple):
    """A queue: messages that wait in it, and its consumers."""

    ready: int
    consumers: int


@dataclass(frozen=True)
class BrokerFigures:
    """What RabbitMQ told. A queue that does not exist is absent. `alarms`: None if this user may not ask."""

    queues: Mapping[str, QueueCount]
    alarms: tuple[Alarm, ...] | None


def queue_names(task_types: Iterable[str]) -> list[str]:
    """Every queue whose messages count, for these types."""
    names = [UNROUTABLE, CALLBACKS_QUEUE, *DELAY_QUEUES, *map(retry_exchange, RETRY_LEVELS)]
    for task_type in task_types:
        names += [dead_queue(task_type), *(work_queue(task_type, priority) for priority in PRIORITIES)]
    return names


class BrokerReader:
    """Reads the figures on one connection, and asks for alarms on another. For one thread.

    In an alarm the broker reads nothing more from a connection that has published.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._connection: pika.BlockingConnection | None = None
        self._alarms = _AlarmProbe(settings)
        self._readings = 0
        self._delays: dict[str, QueueCount] = {}

    def read(self, task_types: Iterable[str]) -> BrokerFigures:
        """The figures now. Raises BrokerUnavailable."""
        names = queue_names(task_types)
        if self._connection is not None:
            # It may have died since: between two readings nobody answers its heartbeats.
            with suppress(AMQPError):
                return self._read(names)
            self.close()
        try:
            return self._read(names)
        except AMQPError as error:
            self.close()
            raise BrokerUnavailable(f"the connection to RabbitMQ was lost: {error!r}") from error

    def close(self) -> None:
        self._alarms.close()
        _close(self._connection)
        self._connection = None

    def _read(self, names: Iterable[str]) -> BrokerFigures:
        incomplete = len(self._delays) < len(DELAY_QUEUES)  # as long as nobody has declared them
        with_delays = incomplete or self._readings % _DELAYS_EVERY == 0
        found = self._counts(name for name in names if with_delays or name not in DELAY_QUEUES)
        if with_delays:
            self._delays = {name: found[name] for name in DELAY_QUEUES if name in found}
        self._readings += 1
        return BrokerFigures({**self._delays, **found}, self._alarms.ask())

    def _counts(self, names: Iterable[str]) -> dict[str, QueueCount]:
        if self._connection is None:
            self._connection = connect(self._settings, name="monitor")
        found = {}
        channel = self._connection.channel()
        for name in names:
            try:
                told = channel.queue_declare(name, passive=True).method
            except ChannelClosedByBroker as error:
                if error.reply_code != _MISSING:
                    raise
                channel = self._connection.channel()  # the broker closed the other
            else:
                found[name] = QueueCount(told.message_count or 0, told.consumer_count or 0)
        channel.close()
        return found


class _AlarmProbe:
    """Publishes a message that goes nowhere, to learn whether the broker blocks publishers.

    The broker blocks a connection only once that publishes, and tells the reason only then. So a blocked connection is
    given up, and the next question makes a new one. https://www.rabbitmq.com/docs/connection-blocked
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings.model_copy(update={"amqp_blocked_limit": _BLOCKED_SECONDS})
        self._connection: pika.BlockingConnection | None = None
        self._reason = ""
        self._refused = False

    def ask(self) -> tuple[Alarm, ...] | None:
        """The alarms that block publishers now; None if the broker refuses the message. Raises AMQPError."""
        with suppress(ConnectionBlockedTimeout):
            return self._ask()
        # It blocked the connection after the last question, and pika does not pass on why.
        self._connection = None
        with suppress(ConnectionBlockedTimeout):
            return self._ask()
        self._connection = None
        return None

    def _ask(self) -> tuple[Alarm, ...] | None:
        if self._connection is None:
            self._connection = connect(self._settings, name="monitor alarms")
            # The stubs leave out the connection.
            self._connection.add_on_connection_blocked_callback(self._blocked)  # type: ignore[arg-type]
        self._reason = ""
        try:
            channel = self._connection.channel()
            channel.basic_publish(ALARM_EXCHANGE, "", b"")
            # pika calls `_blocked` here alone.
            self._connection.process_data_events(_LISTEN_SECONDS)  # type: ignore[arg-type]  # a float
            if not self._reason:
                channel.close()
                return ()
        except (ChannelClosedByBroker, ChannelWrongStateError) as error:
            if not self._refused:
                _log.warning("alarms of RabbitMQ are unknown: %s", error)
            self._refused = True
            return None
        self.close()
        kinds: tuple[Alarm, ...] = ("disk", "memory")
        return tuple(kind for kind in kinds if kind in self._reason)  # as in `low on memory & disk`

    def close(self) -> None:
        _close(self._connection)
        self._connection = None

    def _blocked(self, _connection: object, frame: Any) -> None:
        self._reason = str(frame.method.reason)


def _close(connection: pika.BlockingConnection | None) -> None:
    if connection is not None and connection.is_open:
        with suppress(AMQPError):
            connection.close()
