"""The exchanges and queues as data, applied idempotently and compared with the broker.

All essential properties are queue arguments, not policies, so a broker without policies is safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

from inferq.broker.errors import BrokerUnavailable, TopologyMismatch
from inferq.broker.retry import RETRY_LEVELS
from inferq.schemas import PRIORITIES, Priority

TASKS = "inference.tasks"
DEAD = "inference.dead"
DROPPED = "inference.dropped"
"""The headers exchange and the queue of copies of the messages that RabbitMQ itself dead-letters."""
UNROUTABLE = "inference.unroutable"
JOBS = "inference.jobs"
"""The topic exchange of the light jobs, which Celery runs. A job queue's name is its routing key."""

JobQueue = Literal["inference.callbacks", "inference.batches"]
JOB_QUEUES: tuple[JobQueue, ...] = get_args(JobQueue)

DELAY_LEVELS = 28
"""The queues of Celery's native delayed delivery: one for each bit of a delay in whole seconds."""

DELAYED = "celery_delayed_delivery"
"""The topic exchange that a delayed job reaches after its delay."""

ACCESS_REFUSED = 403
"""The code with which the broker closes a channel of a user without the permission."""

MAY_NOT_DECLARE = (
    "this broker user may not declare exchanges and queues; run as a user with the permission to configure: "
    "inferq topology apply"
)

DELIVERY_LIMIT = 100
"""Deliveries of one message before RabbitMQ dead-letters it: a safety net far above our own attempts. Before
RabbitMQ 4.3, a requeued delivery counts, too."""

NO_DELIVERY_LIMIT = 1_000_000_000
"""RabbitMQ 4 limits quorum queues to 20 deliveries by default. In queues whose messages are inspected and requeued,
that would drop them. RabbitMQ 3 does not accept -1, which later means no limit."""


@lru_cache(1024)
def routing_key(type_name: str, priority: Priority = "normal") -> str:
    return f"task_type.{type_name}.{priority}"


def work_queue(type_name: str, priority: Priority = "normal") -> str:
    return f"inference.{type_name}.{priority}"


def dead_queue(type_name: str) -> str:
    return f"inference.dead.{type_name}"


def retry_exchange(seconds: int) -> str:
    """The name of a retry level's fanout exchange and queue."""
    return f"inference.retry.{seconds}s"


@dataclass(frozen=True)
class Exchange:
    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def declaration(self) -> tuple[str, dict[str, Any]]:
        return "exchange_declare", {
            "exchange": self.name,
            "exchange_type": self.kind,
            "durable": True,
            "arguments": self.arguments,
        }


@dataclass(frozen=True)
class Queue:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def declaration(self) -> tuple[str, dict[str, Any]]:
        return "queue_declare", {
            "queue": self.name,
            "durable": True,
            "arguments": {"x-queue-type": "quorum", **self.arguments},
        }


@dataclass(frozen=True)
class Binding:
    """Routes from `exchange` to `queue` by routing key. `to_exchange`: `queue` names an exchange.

    `arguments` are for a headers exchange. A `removed` binding to a queue is one of an earlier version.
    """

    exchange: str
    queue: str
    routing_key: str = ""
    to_exchange: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    removed: bool = False

    def declaration(self) -> tuple[str, dict[str, Any]]:
        arguments = {"arguments": self.arguments} if self.arguments else {}
        if self.to_exchange:
            return "exchange_bind", {
                "destination": self.queue,
                "source": self.exchange,
                "routing_key": self.routing_key,
                **arguments,
            }
        return "queue_unbind" if self.removed else "queue_bind", {
            "queue": self.queue,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            **arguments,
        }


@dataclass(frozen=True)
class Difference:
    """One difference between a broker and the topology."""

    kind: str
    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}: {self.problem}"


@dataclass(frozen=True)
class Topology:
    """Exchanges, queues and bindings, in the order of their declaration."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]

    def declarations(self) -> list[tuple[str, dict[str, Any]]]:
        """The AMQP declarations, each as a method name of pika's channel and its arguments."""
        parts: list[Exchange | Queue | Binding] = [*self.exchanges, *self.queues, *self.bindings]
        return [part.declaration() for part in parts]

    def checks(self) -> list[tuple[str, dict[str, Any]]]:
        """Passive declarations: they need no permission to configure, and fail if something is missing.

        They compare no arguments, and AMQP cannot check bindings.
        https://www.rabbitmq.com/docs/access-control#authorisation
        """
        parts: list[Exchange | Queue] = [*self.exchanges, *self.queues]
        return [(method, {**given, "passive": True}) for method, given in (p.declaration() for p in parts)]

    def apply(self, channel: BlockingChannel) -> None:
        """Declare what is missing. Raises TopologyMismatch at the first difference."""
        for method, arguments in self.declarations():
            try:
                getattr(channel, method)(**arguments)
            except ChannelClosedByBroker as error:
                raise mismatch(error) from error

    def ensure(self, connection: BlockingConnection) -> bool:
        """Declare what is missing. Returns False if the user may not, and all exchanges and queues exist.

        Raises TopologyMismatch at a difference, and BrokerUnavailable if the user may not declare what is missing.
        """
        try:
            self.apply(connection.channel())
            return True
        except TopologyMismatch as error:
            refusal = error.__cause__
            if not isinstance(refusal, ChannelClosedByBroker) or refusal.reply_code != ACCESS_REFUSED:
                raise
        channel = connection.channel()
        for method, arguments in self.checks():
            try:
                getattr(channel, method)(**arguments)
            except ChannelClosedByBroker as error:
                raise BrokerUnavailable(f"{error.reply_text}; {MAY_NOT_DECLARE}") from error
        return False

    def declare(self, channel: Channel, done: Callable[[], None], *, only_check: bool = False) -> None:
        """Declare everything, or check that it exists, on an asynchronous channel; then call `done`.

        Only the last declaration asks for an answer, so that all take one round trip: pika sends nothing before the
        answer to an earlier one. A removed binding always asks, so it stands last. At a difference the broker closes
        the channel; `mismatch` explains the error.
        """
        declarations = self.checks() if only_check else self.declarations()
        for method, arguments in declarations[:-1]:
            getattr(channel, method)(**arguments)
        method, arguments = declarations[-1]
        getattr(channel, method)(**arguments, callback=lambda _frame: done())

    def differences(self, connection: BlockingConnection) -> list[Difference]:
        """What is missing on the broker or differs. Changes nothing.

        AMQP cannot list bindings, so they are not compared; `apply` creates them.
        """
        found = []
        parts: list[Exchange | Queue] = [*self.exchanges, *self.queues]
        for part in parts:
            kind = "exchange" if isinstance(part, Exchange) else "queue"
            method, arguments = part.declaration()
            # Passive first: a full declaration would create what is missing.
            missing = _refusal(connection, method, {**arguments, "passive": True})
            if missing is not None:
                problem = "is missing" if missing.reply_code == 404 else missing.reply_text
                found.append(Difference(kind, part.name, problem))
                continue
            refused = _refusal(connection, method, arguments)
            if refused is not None:
                found.append(Difference(kind, part.name, _explain(refused.reply_text)))
        return found


def _refusal(
    connection: BlockingConnection, method: str, arguments: dict[str, Any]
) -> ChannelClosedByBroker | None:
    channel = connection.channel()  # a refusal closes the channel
    try:
        getattr(channel, method)(**arguments)
    except ChannelClosedByBroker as error:
        return error
    channel.close()
    return None


_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<argument>[^']+)' for (?P<kind>exchange|queue) '(?P<name>[^']+)' in vhost "
    r"'(?P<vhost>[^']*)': received (?P<ours>.+?) but current is (?P<theirs>.+)$"
)


def mismatch(error: ChannelClosedByBroker) -> TopologyMismatch:
    """The broker's refusal of a declaration, with the queue, the argument and both values."""
    found = _INEQUIVALENT.search(error.reply_text)
    subject = f"{found['kind']} {found['name']!r} in vhost {found['vhost']!r}: " if found else ""
    return TopologyMismatch(f"{subject}{_explain(error.reply_text)}")


def _explain(reply_text: str) -> str:
    found = _INEQUIVALENT.search(reply_text)
    if not found:
        return reply_text
    return (
        f"argument {found['argument']!r} is {_value(found['theirs'])} on the broker and should be "
        f"{_value(found['ours'])}; drain and delete the {found['kind']}, then run: inferq topology apply"
    )


def _value(text: str) -> str:
    # "the value '5000' of type 'signedint'" in RabbitMQ's words.
    quoted = re.search(r"'([^']*)'", text)
    return quoted[1] if quoted else text.strip()


def topology_for(type_names: Iterable[str]) -> Topology:
    """Everything that tasks of these types need, including the shared parts."""
    exchanges = [
        Exchange(UNROUTABLE, "fanout"),
        Exchange(TASKS, "topic", {"alternate-exchange": UNROUTABLE}),
        _dead_exchange(),
        _DROPPED_EXCHANGE,
    ]
    queues = [_unroutable_queue(), _dropped_queue()]
    bindings = [Binding(UNROUTABLE, UNROUTABLE), *_DROPPED_BINDINGS]
    exchanges.append(Exchange(JOBS, "topic"))
    for job_queue in JOB_QUEUES:
        queues.append(_job_queue(job_queue))
        bindings.append(Binding(JOBS, job_queue, job_queue))
    for seconds in RETRY_LEVELS:
        name = retry_exchange(seconds)
        # A fanout keeps the routing key, so an expired message returns to its original queue.
        exchanges.append(Exchange(name, "fanout"))
        queues.append(Queue(name, {"x-message-ttl": seconds * 1000, **_dead_lettering(TASKS)}))
        bindings.append(Binding(name, name))
    for type_name in type_names:
        queues.append(Queue(dead_queue(type_name), {"x-delivery-limit": NO_DELIVERY_LIMIT}))
        bindings.append(Binding(DEAD, dead_queue(type_name), f"task_type.{type_name}.#"))
        for priority in PRIORITIES:
            queue, key = work_queue(type_name, priority), routing_key(type_name, priority)
            queues.append(
                Queue(
                    queue,
                    {
                        "x-delivery-limit": DELIVERY_LIMIT,
                        **_dead_lettering(DEAD),
                        # A message published directly to the queue has another routing key.
                        "x-dead-letter-routing-key": key,
                    },
                )
            )
            bindings.append(Binding(TASKS, queue, key))
            if priority == "normal":
                bindings.append(Binding(TASKS, queue, f"task_type.{type_name}"))
    bindings.append(_COPIES_OF_ALL)
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))


def job_topology() -> Topology:
    """What the light jobs need: their queues, and those of delayed jobs.

    Celery declares the latter itself, with one round trip each, and ignores a failure. They are declared here
    first, exactly as Celery does.
    https://github.com/celery/kombu/blob/main/kombu/transport/native_delayed_delivery.py
    """
    exchanges = [
        Exchange(UNROUTABLE, "fanout"),
        _dead_exchange(),
        _DROPPED_EXCHANGE,
        Exchange(JOBS, "topic"),
        Exchange(DELAYED, "topic"),
    ]
    queues = [_unroutable_queue(), _dropped_queue()]
    bindings = [Binding(UNROUTABLE, UNROUTABLE), *_DROPPED_BINDINGS]
    for job_queue in JOB_QUEUES:
        queues.append(_job_queue(job_queue))
        bindings += [
            Binding(JOBS, job_queue, job_queue),
            Binding(JOBS, job_queue, f"#.{job_queue}"),
            Binding(DELAYED, JOBS, f"#.{job_queue}", to_exchange=True),
        ]
    for level in range(DELAY_LEVELS):
        name, below = delay_level(level), delay_level(level - 1) if level else DELAYED
        exchanges.append(Exchange(name, "topic"))
        queues.append(Queue(name, {"x-message-ttl": 2**level * 1000, **_dead_lettering(below)}))
        # The bit of this level decides: 1 waits here, 0 goes to the next level.
        skipped = "*." * (DELAY_LEVELS - 1 - level)
        bindings.append(Binding(name, name, f"{skipped}1.#"))
        bindings.append(Binding(name, below, f"{skipped}0.#", to_exchange=True))
    bindings.append(_COPIES_OF_ALL)
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))


def delay_level(level: int) -> str:
    """The exchange and queue of a level of delayed delivery, which delays a job by 2**level seconds."""
    return f"celery_delayed_{level}"


def job_queue_arguments() -> dict[str, Any]:
    """The arguments of the job queues, for Celery's own declaration."""
    arguments: dict[str, Any] = _job_queue("").declaration()[1]["arguments"]
    return arguments


def _dead_exchange() -> Exchange:
    return Exchange(DEAD, "topic", {"alternate-exchange": UNROUTABLE})


def _dropped_queue() -> Queue:
    return Queue(DROPPED, {"x-delivery-limit": NO_DELIVERY_LIMIT})


_DROPPED_EXCHANGE = Exchange(DROPPED, "headers")
_DROPPED_BINDINGS = (
    Binding(DEAD, DROPPED, "task_type.#", to_exchange=True),
    # RabbitMQ sets this header on what it dead-letters, and workers' dead letters never have it. A void value matches
    # any value. `any-with-x` needs RabbitMQ 3.10: https://www.rabbitmq.com/docs/exchanges#headers
    Binding(DROPPED, DROPPED, arguments={"x-match": "any-with-x", "x-first-death-reason": None}),
)
_COPIES_OF_ALL = Binding(DEAD, DROPPED, "task_type.#", removed=True)
"""Copies workers' dead letters, too. Without `inferq callbacks` they filled the queue."""


def _unroutable_queue() -> Queue:
    return Queue(UNROUTABLE, {"x-delivery-limit": NO_DELIVERY_LIMIT})


def _job_queue(name: str) -> Queue:
    # An unknown job, or one with an unforeseen error, is rejected and must not be lost.
    return Queue(name, {"x-delivery-limit": NO_DELIVERY_LIMIT, **_dead_lettering(UNROUTABLE)})


def _dead_lettering(exchange: str) -> dict[str, Any]:
    # At-least-once needs all three: https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
    return {
        "x-dead-letter-exchange": exchange,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
