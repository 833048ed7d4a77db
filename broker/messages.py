"""Messages as they go onto the broker and come off it."""

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

from inferq.broker.topology import DEAD, TASKS, retry_exchange, routing_key
from inferq.schemas import SCHEMA_VERSION, InferqError, Priority, Task

ATTEMPT = "x-attempt"
REDRIVES = "x-redrives"
ENGINE_DEATHS = "x-engine-deaths"
DEFERRALS = "x-deferrals"
DIGEST = "x-digest"
"""The digest of a task, made by the part that accepted it; every copy of the message has it."""
VERSION = "x-version"
"""The SCHEMA_VERSION of the part that published the task first; 1 if absent."""
DEAD_PREFIX = "x-dead-"
TRACEPARENT = "traceparent"

_COUNTS = (ATTEMPT, REDRIVES, ENGINE_DEATHS, DEFERRALS, VERSION)
_TRACE = (TRACEPARENT, "tracestate")
_TRACE_CHARACTERS = 512
_MOST = 1_000_000
"""Counts in headers are anybody's to set; beyond this they are taken for this."""

_SHORT_STRING_BYTES = 255
_IS_DIGEST = re.compile(r"[0-9a-f]{64}").fullmatch
_ANY_DIGEST = "0" * 64

_PLAIN = frozenset((int, str))
_TIMESTAMP = struct.Struct(">Q")
_IDENTIFIED = (
    pika.BasicProperties.FLAG_MESSAGE_ID
    | pika.BasicProperties.FLAG_TIMESTAMP
    | pika.BasicProperties.FLAG_TYPE
)


@lru_cache(1024)
def _encoded_head(headers: tuple[tuple[str, Any], ...], _types: tuple[type, ...]) -> bytes:
    """The properties before the message's id, whose flags announce what follows.

    https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, section 4.2.6.1
    """
    head = pika.BasicProperties(content_type="application/json", delivery_mode=2, headers=dict(headers))
    pieces = b"".join(head.encode())
    (flags,) = struct.unpack(">H", pieces[:2])
    return struct.pack(">H", flags | _IDENTIFIED) + pieces[2:]


class Message(NamedTuple):
    """What is published: always persistent, always mandatory."""

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
        """What `properties` travels as, and faster: most of it is the same for many messages.

        Raises what pika raises where it cannot be encoded.
        """
        headers, digest = self.headers, self.headers.get(DIGEST)
        if digest is not None and _is_digest(digest):
            headers = {**headers, DIGEST: _ANY_DIGEST}
        values = tuple(headers.items())
        types = tuple(map(type, headers.values()))
        if self.message_id is None or self.type is None or not _PLAIN.issuperset(types):
            return b"".join(self.properties().encode())
        message_id, kind = self.message_id.encode(), self.type.encode()
        if len(message_id) > 255 or len(kind) > 255:
            raise ShortStringTooLong(self.message_id)
        head = _encoded_head(values, types)
        if headers is not self.headers:
            head = head.replace(_ANY_DIGEST.encode(), str(digest).encode(), 1)
        return head + b"%c%b%b%c%b" % (
            len(message_id), message_id, _TIMESTAMP.pack(int(time.time())), len(kind), kind,
        )  # fmt: skip


@dataclass(frozen=True)
class Delivery:
    """A message that the broker has handed us and that waits for its acknowledgement.

    `epoch` tells the channel that it came on from later ones: a delivery of a lost channel can no longer
    be acknowledged, and the broker delivers it again.
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
        """Which attempt this is, from 1. A header that is not a positive number counts as absent."""
        return _count(self.headers, ATTEMPT, least=1)

    @property
    def redrives(self) -> int:
        return _count(self.headers, REDRIVES)

    @property
    def engine_deaths(self) -> int:
        """How many engine processes earlier attempts of this task have taken down."""
        return _count(self.headers, ENGINE_DEATHS)

    @property
    def deferrals(self) -> int:
        """How often this attempt was put off, because no worker that took it could read the task."""
        return _count(self.headers, DEFERRALS)

    @property
    def digest(self) -> str | None:
        """The task's digest, as the part that accepted the task made it.

        None for a message of a producer of its own, and for a header that is no SHA-256 in hex: the worker
        makes the digest then.
        """
        digest = self.headers.get(DIGEST)
        return digest if _is_digest(digest) else None

    @property
    def version(self) -> int:
        """The SCHEMA_VERSION of the part that published the task first."""
        return _count(self.headers, VERSION, least=1)

    @property
    def deliveries(self) -> int:
        """How often the broker has handed this copy out before; 0 on the first time."""
        # A producer can set the header, too; only on a redelivery is it the broker's own.
        return _count(self.headers, "x-delivery-count") if self.redelivered else 0


def _count(headers: Mapping[str, Any], name: str, *, least: int = 0) -> int:
    value = headers.get(name, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        return least
    return min(value, _MOST)


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _IS_DIGEST(value) is not None


def task_message(
    task: Task,
    *,
    digest: str | None = None,
    attempt: int = 1,
    redrives: int = 0,
    traceparent: str | None = None,
) -> Message:
    """The message that submits a task.

    `digest` is the task's own. Whoever accepts tasks gives it, so that it travels with the task.
    """
    headers: dict[str, Any] = {ATTEMPT: attempt, VERSION: SCHEMA_VERSION}
    if digest is not None:
        headers[DIGEST] = digest
    if redrives:
        headers[REDRIVES] = redrives
    if traceparent:
        headers[TRACEPARENT] = traceparent
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
    """A fresh copy of a delivery that returns to its queue as the next attempt, `seconds` from now."""
    headers = {**_kept(delivery.headers, digest), ATTEMPT: delivery.attempt + 1}
    headers.pop(DEFERRALS, None)
    if engine_deaths:
        headers[ENGINE_DEATHS] = engine_deaths
    key = routing_key(type_name, priority)
    return Message(retry_exchange(seconds), key, delivery.body, headers, task_id, type_name)


def deferred_message(delivery: Delivery, *, type_name: str, priority: Priority, seconds: int) -> Message:
    """A fresh copy of a delivery that returns to its queue `seconds` from now, as the same attempt."""
    headers = {**_kept(delivery.headers), DEFERRALS: delivery.deferrals + 1}
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
    """A copy of a delivery for the dead-letter queue, whose headers say why it ended there."""
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


def redriven_message(delivery: Delivery) -> Message:
    """A dead letter as a first attempt again; one redrive more on its count."""
    headers = {**_kept(delivery.headers), ATTEMPT: 1, REDRIVES: delivery.redrives + 1}
    headers.pop(ENGINE_DEATHS, None)
    headers.pop(DEFERRALS, None)
    type_name = delivery.routing_key.removeprefix("task_type.").partition(".")[0]
    return Message(TASKS, delivery.routing_key, delivery.body, headers, named_id(delivery), type_name)


def named_id(delivery: Delivery) -> str | None:
    """The task's id: the message's own where its producer set one, else the body's, else None.

    An id that no message can carry is none: an unreadable message may name anything.
    """
    if delivery.message_id and _fits(delivery.message_id):
        return delivery.message_id
    try:
        task_id = json.loads(delivery.body)["task_id"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return task_id if _fits(task_id) else None


def _fits(task_id: object) -> bool:
    """Whether it is a short string of AMQP. pika gives one that is not UTF-8 as bytes."""
    try:
        return isinstance(task_id, str) and len(task_id.encode()) <= _SHORT_STRING_BYTES
    except UnicodeEncodeError:
        return False


def _kept(headers: Mapping[str, Any], digest: str | None = None) -> dict[str, Any]:
    """The headers that go on with a copy: our own counts, the digest and the trace, and nothing else.

    `digest` is the task's where the worker had to make it, for a delivery that came without one.

    A producer's other headers may be as large as a frame, to which a copy's own could not be added; and the
    broker's own account of the past (`x-death`) is counted on by 3.x and ignored by 4.x.
    """
    kept: dict[str, Any] = {name: _count(headers, name) for name in _COUNTS if name in headers}
    carried = headers.get(DIGEST)
    if _is_digest(carried):
        kept[DIGEST] = carried
    elif digest is not None:
        kept[DIGEST] = digest
    for name in _TRACE:
        value = headers.get(name)
        if isinstance(value, str) and len(value) <= _TRACE_CHARACTERS and value.isascii():
            kept[name] = value
    return kept
