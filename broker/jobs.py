"""Jobs: work beside the inference tasks that is scheduled, or retried for days. Celery runs it.

A job is a Celery message, sent by inferq's own publisher. So a worker or the gateway gets a confirm for it, and
needs no Celery. `inferq.broker.celery_app` makes the application that runs the jobs.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from inferq.broker.messages import VERSION, Message
from inferq.broker.topology import DELAY_LEVELS, JOBS, JobQueue, delay_level
from inferq.schemas import SCHEMA_VERSION, Callback, CallbackAttempt
from inferq.schemas.trace_context import TraceContext

JOB_ENTRY_POINTS = "inferq.jobs"
"""The entry-point group of functions `(Celery) -> None` that add jobs to an application."""

CALLBACK_JOB = "callbacks.deliver"
"""The job that delivers a callback. Its argument `callback` is the JSON of an inferq.schemas.Callback."""
FEED_JOB = "batches.feed"
ASSEMBLE_JOB = "batches.assemble"
NIGHT_START_JOB = "nightly.start"
NIGHT_WATCH_JOB = "nightly.watch"

QUEUE_JOBS: Mapping[JobQueue, tuple[str, ...]] = {
    "inference.callbacks": (CALLBACK_JOB,),
    "inference.batches": (FEED_JOB, ASSEMBLE_JOB, NIGHT_START_JOB, NIGHT_WATCH_JOB),
}
"""The jobs in each queue. A process that consumes a queue must know all its jobs."""


def job_message(
    name: str,
    queue: JobQueue,
    arguments: Mapping[str, JsonValue],
    *,
    job_id: str,
    retries: int = 0,
    trace: TraceContext | None = None,
) -> Message:
    """The message for the job `name` with these keyword arguments.

    `trace` becomes an argument: parts of older versions pass arguments on that they do not know, but not headers.

    It follows version 2 of Celery's message protocol:
    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    headers = {
        "lang": "py",
        "task": name,
        "id": job_id,
        "root_id": job_id,
        "parent_id": None,
        "group": None,
        "retries": retries,
        "eta": None,
        "expires": None,
        "timelimit": [None, None],
        "ignore_result": True,
        VERSION: SCHEMA_VERSION,
    }
    if trace is not None:
        arguments = {**arguments, "trace": dict(trace.headers())}
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = json.dumps([[], dict(arguments), embedded], ensure_ascii=False, separators=(",", ":"))
    return Message(JOBS, queue, body.encode("utf-8", "surrogatepass"), headers, job_id, name)


class JobHeaders(BaseModel):
    """The headers of a job that are used. Celery would not check the types of the others."""

    model_config = ConfigDict(strict=True, frozen=True)

    task: str
    id: Annotated[str, Field(pattern=r"^[ -~]{1,255}$")]
    retries: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    ignore_result: bool = True


def job_copy(queue: JobQueue, body: bytes, headers: Mapping[str, Any]) -> Message:
    """A copy of a job's message that was delivered with this body and these headers.

    The broker's own headers are left out: RabbitMQ 3.x would count on from them, and 4.x ignores them.
    """
    kept = {name: headers[name] for name in _HEADERS if name in headers}
    return Message(JOBS, queue, body, kept, str(headers.get("id")), str(headers.get("task")))


_HEADERS = (
    "lang", "task", "id", "root_id", "parent_id", "group", "retries", "eta", "expires", "timelimit",
    "ignore_result", VERSION,
)  # fmt: skip


def delayed(message: Message, seconds: float) -> Message:
    """The message of a job, delayed by whole seconds: rounded up, at least 1.

    It waits in the queues of Celery's native delayed delivery, one for each bit of the delay. The processes
    that run jobs declare these queues.
    https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html
    """
    whole = min(max(1, math.ceil(seconds)), 2**DELAY_LEVELS - 1)
    bits = ".".join(f"{whole:0{DELAY_LEVELS}b}")
    # Celery publishes to the highest level. Each exchange from there down matches the long key, which takes
    # the broker milliseconds. The levels above the first 1 would only pass the message down.
    level = delay_level(whole.bit_length() - 1)
    return message._replace(exchange=level, routing_key=f"{bits}.{message.routing_key}")


def callback_message(
    callback: Callback,
    *,
    attempts: Sequence[CallbackAttempt] = (),
    resent_at: datetime | None = None,
    since: datetime | None = None,
    more: Mapping[str, JsonValue] = MappingProxyType({}),
    trace: TraceContext | None = None,
) -> Message:
    """The message that delivers a callback, with all its retries.

    `attempts` were made so far. `resent_at`: when its owner asked for a resend. `since`: when a callbacks
    process first saw it. `more`: arguments of a newer version, which are passed on.
    """
    return job_message(
        CALLBACK_JOB,
        "inference.callbacks",
        {
            "callback": callback.model_dump(mode="json"),
            "attempts": [attempt.model_dump(mode="json", exclude_none=True) for attempt in attempts],
            **({"resent_at": resent_at.isoformat()} if resent_at is not None else {}),
            **({"since": since.isoformat()} if since is not None else {}),
            **more,
        },
        job_id=callback.callback_id,
        retries=len(attempts),
        trace=trace,
    )


def feed_message(
    tenant: str,
    batch_id: str,
    *,
    chain: str,
    part: int = 0,
    line: int = 0,
    offset: int = 0,
    more: Mapping[str, JsonValue] = MappingProxyType({}),
    trace: TraceContext | None = None,
) -> Message:
    """The job that feeds a batch from the line after `line`, which ends at `offset` bytes of the source.

    `chain` names the whole feeding; `part` counts its slices. `more`: arguments of a newer version, which are
    passed on.
    """
    arguments: dict[str, JsonValue] = {
        "tenant": tenant, "batch_id": batch_id, "chain": chain, "part": part, "line": line, "offset": offset,
        **more,
    }  # fmt: skip
    return job_message(FEED_JOB, "inference.batches", arguments, job_id=f"feed-{chain}-{part}", trace=trace)


def assemble_message(
    tenant: str, batch_id: str, *, error: str | None = None, trace: TraceContext | None = None
) -> Message:
    """The job that assembles the results of a batch after its lines have ended.

    `error`: why the batch could not be fed.
    """
    arguments: dict[str, JsonValue] = {"tenant": tenant, "batch_id": batch_id, "error": error}
    job_id = f"assemble-{secrets.token_hex(6)}"
    return job_message(ASSEMBLE_JOB, "inference.batches", arguments, job_id=job_id, trace=trace)
