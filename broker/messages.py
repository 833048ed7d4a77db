"""The messages of tasks: their headers, copies and encoding.

Headers are optional. A worker of an older version drops those that it does not know when it publishes a copy.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import pika
from pika.exceptions import ShortStringTooLong

from inferq.broker.topology import DEAD, DROPPED, TASKS, retry_exchange, routing_key
from inferq.schemas import SCHEMA_VERSION, InferqError, Priority, Task
from inferq.schemas.trace_context import TRACEPARENT, TraceContext, trace_context

ATTEMPT = "x-attempt"
REDRIVES = "x-redrives"
ENGINE_DEATHS = "x-engine-deaths"
DEFERRALS = "x-deferrals"
WAITS = "x-waits"
DIGEST = "x-digest"
"""The digest of the task, from the part that accepted it. Every copy of the message has it."""
VERSION = "x-version"
"""The SCHEMA_VERSION of the part that first published the task; 1 if absent."""
DEAD_PREFIX = "x-dead-"
TRACE_LINK = "x-trace-link"
"""The `traceparent` of the batch of which the task is a line. The task has a trace of its own, which links to it."""

_COUNTS = (ATTEMPT, REDRIVES, ENGINE_DEATHS, DEFERRALS, VERSION)
_MOST = 1_000_000
"""The largest count in a header. Producers can set headers, so larger ones are cut to this."""

_SHORT_STRING_BYTES = 255
_IS_DIGEST = re.compile(r"[0-9a-f]{64}").fullmatch
_ANY_DIGEST = "0" * 64
_ANY_TRACE = f"00-{'0' * 32}-{'0' * 16}-00"

_PLAIN = frozenset((int, str))
_TIMESTAMP = struct.Struct(">Q")
_IDENTIFIED = (
    pika.BasicProperties.FLAG_MESSAGE_ID
    | pika.BasicProperties.FLAG_TIMESTAMP
    | pika.BasicProperties.FLAG_TYPE
)


@lru_cache(1024)
def _encoded_head(headers: tuple[tuple[str, Any], ...], _types: tuple[type, ...]) -> bytes:
    """The encoded properties before the message id. The flags include those of the rest.

    https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, section 4.2.6.1
    """
    head = pika.BasicProperties(content_type="application/json", delivery_mode=2, headers=dict(headers))
    pieces = b"".join(head.encode())
    (flags,) = struct.unpack(">H", pieces[:2])
    return struct.pack(">H", flags | _IDENTIFIED) + pieces[2:]


class Message(NamedTuple):
    """A message to publish. It is always persistent and mandatory."""

    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any] = MappingProxyType({})
    message_id: str | None = None
    type: str | None = None

    def properties(self) -> pika.BasicProperties:
        return pika.BasicProperties(
            content_type="application/json",
            delivery_mode=2,
            message_id=self.message_id,
            type=self.type,
            timestamp=int(datetime.now(UTC).timestamp()),
            headers=dict(self.headers),
        )

    def encoded_properties(self) -> bytes:
        """The same properties encoded, and faster: most of them are equal for many messages.

        Raises what pika raises for properties that cannot be encoded.
        """
        headers, digest, trace = self.headers, self.headers.get(DIGEST), self.headers.get(TRACEPARENT)
        if digest is not None and _is_digest(digest):
            headers = {**headers, DIGEST: _ANY_DIGEST}
        if isinstance(trace, str) and len(trace) == len(_ANY_TRACE) and trace.isascii():
            headers = {**headers, TRACEPARENT: _ANY_TRACE}
        values = tuple(headers.items())
        types = tuple(map(type, headers.values()))
        if self.message_id is None or self.type is None or not _PLAIN.issuperset(types):
            return b"".join(self.properties().encode())
        message_id, kind = self.message_id.encode(), self.type.encode()
        if len(message_id) > 255 or len(kind) > 255:
            raise ShortStringTooLong(self.message_id)
        head = _encoded_head(values, types)
        if headers is not self.headers:
            # `traceparent` comes before `tracestate`, whose value a producer chooses.
            if headers.get(DIGEST) is _ANY_DIGEST:
                head = head.replace(_ANY_DIGEST.encode(), str(digest).encode(), 1)
            if headers.get(TRACEPARENT) is _ANY_TRACE:
                head = head.replace(_ANY_TRACE.encode(), str(trace).encode(), 1)
        return head + b"%c%b%b%c%b" % (
            len(message_id), message_id, _TIMESTAMP.pack(int(time.time())), len(kind), kind,
        )  # fmt: skip


@dataclass(frozen=True)
class Delivery:
    """A message from the broker that is not acknowledged yet.

    `epoch` numbers the channels. A delivery of a lost channel cannot be acknowledged, and the broker delivers
    it again.
    """

    queue: str
    tag: int
    epoch: int
    body: bytes
    routing_key: str
    headers: Mapping[str, Any]
    redelivered: bool
    message_id: str | None = None
    timestamp: datetime | None = None

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1. A header that is not a positive number counts as absent."""
        return _count(self.headers, ATTEMPT, least=1)

    @property
    def redrives(self) -> int:
        return _count(self.headers, REDRIVES)

    @property
    def engine_deaths(self) -> int:
        """The number of engine processes that earlier attempts of this task ended."""
        return _count(self.headers, ENGINE_DEATHS)

    @property
    def deferrals(self) -> int:
        """How often this attempt was put off because the worker could not read the task."""
        return _count(self.headers, DEFERRALS)

    @property
    def waits(self) -> int:
        """How often in a row this copy waited for a later attempt of its task."""
        return _count(self.headers, WAITS)

    @property
    def digest(self) -> str | None:
        """The digest of the task, from the part that accepted it.

        None if a producer published to RabbitMQ directly, or if the header is not a SHA-256 in hex. The worker
        then makes the digest. inferq trusts the header: only producers with access to RabbitMQ can set it.
        """
        digest = self.headers.get(DIGEST)
        return digest if _is_digest(digest) else None

    @property
    def version(self) -> int:
        """The SCHEMA_VERSION of the part that first published the task."""
        return _count(self.headers, VERSION, least=1)

    @property
    def deliveries(self) -> int:
        """How often the broker delivered this copy before; 0 the first time."""
        # A producer can set the header as well. On a redelivery it is the broker's.
        return _count(self.headers, "x-delivery-count") if self.redelivered else 0


def _count(headers: Mapping[str, Any], name: str, *, least: int = 0) -> int:
    value = headers.get(name, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        return least
    return min(value, _MOST)


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _IS_DIGEST(value) is not None


def task_message(task: Task, *, digest: str | None = None, link: TraceContext | None = None) -> Message:
    """The message that submits a task.

    A part that accepts tasks passes their `digest`, so that it travels with the task. `link`: see TRACE_LINK.
    """
    headers: dict[str, Any] = {ATTEMPT: 1, VERSION: SCHEMA_VERSION}
    if digest is not None:
        headers[DIGEST] = digest
    if link is not None:
        headers[TRACE_LINK] = link.traceparent
    return Message(
        TASKS, routing_key(task.task_type, task.priority), task.body(), headers, task.task_id, task.task_type
    )


def retry_message(
    delivery: Delivery,
    *,
    task_id: str,
    type_name: str,
    priority: Priority,
    seconds: int,
    digest: str | None = None,
    engine_deaths: int = 0,
) -> Message:
    """A copy of a delivery that returns to its queue in `seconds`, as the next attempt."""
    headers = {**_kept(delivery.headers, digest), ATTEMPT: delivery.attempt + 1}
    headers.pop(DEFERRALS, None)
    if engine_deaths:
        headers[ENGINE_DEATHS] = engine_deaths
    key = routing_key(type_name, priority)
    return Message(retry_exchange(seconds), key, delivery.body, headers, task_id, type_name)


def deferred_message(delivery: Delivery, *, type_name: str, priority: Priority, seconds: int) -> Message:
    """A copy of a delivery that returns to its queue in `seconds`, as the same attempt."""
    headers = {**_kept(delivery.headers), DEFERRALS: delivery.deferrals + 1}
    key = routing_key(type_name, priority)
    return Message(retry_exchange(seconds), key, delivery.body, headers, named_id(delivery), type_name)


def waiting_message(
    delivery: Delivery,
    *,
    type_name: str,
    priority: Priority,
    seconds: int,
    digest: str | None = None,
    waits: int = 0,
) -> Message:
    """A copy of a delivery that returns to its queue in `seconds`, with all its other counts unchanged."""
    headers = _kept(delivery.headers, digest)
    if waits:
        headers[WAITS] = waits
    key = routing_key(type_name, priority)
    return Message(retry_exchange(seconds), key, delivery.body, headers, named_id(delivery), type_name)


def dead_message(
    delivery: Delivery,
    *,
    type_name: str,
    priority: Priority,
    error: InferqError,
    worker: str,
    digest: str | None = None,
) -> Message:
    """A copy of a delivery for the dead-letter queue, with the reason in its headers."""
    headers = {
        **_kept(delivery.headers, digest),
        f"{DEAD_PREFIX}reason": error.code,
        f"{DEAD_PREFIX}error": error.message[:4000].encode("utf-8", "replace").decode(),
        f"{DEAD_PREFIX}attempts": delivery.attempt,
        f"{DEAD_PREFIX}worker": worker,
        f"{DEAD_PREFIX}time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    key = routing_key(type_name, priority)
    return Message(DEAD, key, delivery.body, headers, named_id(delivery), type_name)


def dropped_message(delivery: Delivery) -> Message:
    """The same copy of a dropped message once more, behind all others in `inference.dropped`."""
    return Message(DROPPED, delivery.routing_key, delivery.body, dict(delivery.headers))


def redriven_message(delivery: Delivery) -> Message:
    """A copy of a dead letter that is a first attempt again, with one more redrive."""
    headers = {**_kept(delivery.headers), ATTEMPT: 1, REDRIVES: delivery.redrives + 1}
    headers.pop(ENGINE_DEATHS, None)
    headers.pop(DEFERRALS, None)
    type_name = delivery.routing_key.removeprefix("task_type.").partition(".")[0]
    return Message(TASKS, delivery.routing_key, delivery.body, headers, named_id(delivery), type_name)


def named_id(delivery: Delivery) -> str | None:
    """The task id: the message id if the producer set one, else the id in the body, else None.

    An id that does not fit into a message counts as None.
    """
    if delivery.message_id and _fits(delivery.message_id):
        return delivery.message_id
    try:
        task_id = json.loads(delivery.body)["task_id"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return task_id if _fits(task_id) else None


def _fits(task_id: object) -> bool:
    """Whether it is a short string of AMQP. pika returns strings that are not UTF-8 as bytes."""
    try:
        return isinstance(task_id, str) and len(task_id.encode()) <= _SHORT_STRING_BYTES
    except UnicodeEncodeError:
        return False


def _kept(headers: Mapping[str, Any], digest: str | None = None) -> dict[str, Any]:
    """The headers of a copy: inferq's counts, the digest and the trace, and nothing else.

    `digest` is the one that the worker made, for a delivery without one.

    A producer's other headers may fill a frame, and leave no room for ours. RabbitMQ 3.x would count on from
    its own `x-death` header, and 4.x ignores it.
    """
    kept: dict[str, Any] = {name: _count(headers, name) for name in _COUNTS if name in headers}
    carried = headers.get(DIGEST)
    if _is_digest(carried):
        kept[DIGEST] = carried
    elif digest is not None:
        kept[DIGEST] = digest
    if TRACEPARENT in headers and (context := trace_context(headers)) is not None:
        kept.update(context.headers())
    if TRACE_LINK in headers and (link := trace_context({TRACEPARENT: headers[TRACE_LINK]})) is not None:
        kept[TRACE_LINK] = link.traceparent
    return kept
