"""Light jobs: what Celery carries beside the inference tasks, because it is retried for days, or scheduled.

A job is a Celery message that our own publisher sends: whoever hands one over (a worker, the gateway) gets
its confirm as for any other message and needs no Celery. `inferq.broker.celery_app` makes the application that
works on them.
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

JOB_ENTRY_POINTS = "inferq.jobs"
"""The entry-point group of functions `(Celery) -> None` that add their jobs to an application."""

CALLBACK_JOB = "callbacks.deliver"
"""The job that delivers a callback; its argument `callback` is the JSON of an inferq.schemas.Callback."""
FEED_JOB = "batches.feed"
ASSEMBLE_JOB = "batches.assemble"
NIGHT_START_JOB = "nightly.start"
NIGHT_WATCH_JOB = "nightly.watch"

QUEUE_JOBS: Mapping[JobQueue, tuple[str, ...]] = {
    "inference.callbacks": (CALLBACK_JOB,),
    "inference.batches": (FEED_JOB, ASSEMBLE_JOB, NIGHT_START_JOB, NIGHT_WATCH_JOB),
}
"""The jobs that come by each queue: whoever takes from it has to know them all."""


def job_message(
    name: str, queue: JobQueue, arguments: Mapping[str, JsonValue], *, job_id: str, retries: int = 0
) -> Message:
    """The message that has the job `name` done with these keyword arguments.

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
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = json.dumps([[], dict(arguments), embedded], ensure_ascii=False, separators=(",", ":"))
    return Message(JOBS, queue, body.encode("utf-8", "surrogatepass"), headers, job_id, name)


class JobHeaders(BaseModel):
    """What is heeded of a job's headers; Celery would trust all others to be of the right type."""

    model_config = ConfigDict(strict=True, frozen=True)

    task: str
    id: Annotated[str, Field(pattern=r"^[ -~]{1,255}$")]
    retries: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    ignore_result: bool = True


def job_copy(queue: JobQueue, body: bytes, headers: Mapping[str, Any]) -> Message:
    """A fresh copy of a job's message that was delivered with this body and these headers.

    The broker's own headers stay behind: RabbitMQ 3.x would count on by them, and 4.x ignore them.
    """
    kept = {name: headers[name] for name in _HEADERS if name in headers}
    return Message(JOBS, queue, body, kept, str(headers.get("id")), str(headers.get("task")))


_HEADERS = (
    "lang", "task", "id", "root_id", "parent_id", "group", "retries", "eta", "expires", "timelimit",
    "ignore_result", VERSION,
)  # fmt: skip


def delayed(message: Message, seconds: float) -> Message:
    """The job's message such that it arrives so many seconds later, rounded up to whole ones, at least 1.

    It rests in the queues of Celery's native delayed delivery, one for each bit of the delay; those are
    declared by whoever works on the jobs.
    https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html
    """
    whole = min(max(1, math.ceil(seconds)), 2**DELAY_LEVELS - 1)
    bits = ".".join(f"{whole:0{DELAY_LEVELS}b}")
    # Celery enters at the highest level, whose exchange and those below each look at the long key: that takes
    # the broker milliseconds. The levels above the first 1 would only pass it down.
    level = delay_level(whole.bit_length() - 1)
    return message._replace(exchange=level, routing_key=f"{bits}.{message.routing_key}")


def callback_message(
    callback: Callback,
    *,
    attempts: Sequence[CallbackAttempt] = (),
    resent_at: datetime | None = None,
    since: datetime | None = None,
    more: Mapping[str, JsonValue] = MappingProxyType({}),
) -> Message:
    """The message that has a callback delivered, however long that takes.

    `attempts` are those that were made so far. `resent_at`: when its owner asked for it again. `since`: when
    the delivery first saw it. `more`: arguments of a newer version, which go on with it.
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
) -> Message:
    """The job that feeds a batch from behind `line`, which ends at `offset` bytes of the source.

    `chain` names the feeding from its start to its end, `part` counts its slices. `more`: arguments of a newer
    version, which go on with the job.
    """
    arguments: dict[str, JsonValue] = {
        "tenant": tenant, "batch_id": batch_id, "chain": chain, "part": part, "line": line, "offset": offset,
        **more,
    }  # fmt: skip
    return job_message(FEED_JOB, "inference.batches", arguments, job_id=f"feed-{chain}-{part}")


def assemble_message(tenant: str, batch_id: str, *, error: str | None = None) -> Message:
    """The job that puts the results of a batch together, once its lines have ended.

    `error` says why it could not be fed at all.
    """
    arguments: dict[str, JsonValue] = {"tenant": tenant, "batch_id": batch_id, "error": error}
    job_id = f"assemble-{secrets.token_hex(6)}"
    return job_message(ASSEMBLE_JOB, "inference.batches", arguments, job_id=job_id)
