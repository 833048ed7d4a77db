"""Callbacks: an event of a task or batch for its owner, in the form of Standard Webhooks.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints

from inferq.schemas.batch import BatchSummary
from inferq.schemas.encoding import to_json
from inferq.schemas.record import SCHEMA_VERSION, Record
from inferq.schemas.result import Result
from inferq.schemas.status import Event, Truncated
from inferq.schemas.task import HttpText, TaskId, Tenant

MAX_CALLBACK_BYTES = 20_000
"""A callback's body stays below this many bytes, as Standard Webhooks advises."""

SubjectKind = Literal["task", "batch"]

_ERROR_CHARACTERS = 500
_SCHEDULE_CHARACTERS = 64
"""The longest name of a schedule. Old summaries may hold a longer one."""


def _small(body: str) -> str:
    size = len(body.encode())
    if size >= MAX_CALLBACK_BYTES:
        raise ValueError(f"a callback's body stays below {MAX_CALLBACK_BYTES} bytes, this one has {size}")
    return body


class Callback(Record):
    """One event for one receiver. `body` is the exact JSON text that is signed and sent.

    `callback_id` is the `webhook-id`. Every repeat of the event has the same one.
    """

    callback_id: Annotated[str, StringConstraints(pattern=r"^msg_[0-9a-f]{32}$")]
    tenant: Tenant
    subject_kind: SubjectKind
    subject_id: TaskId
    event: Annotated[str, StringConstraints(pattern=r"^[a-z]+(\.[a-z_]+)+$", max_length=64)]
    url: HttpText
    body: Annotated[str, AfterValidator(_small)]


class CallbackAttempt(Record):
    """One attempt to deliver a callback: the `status` and start of the answer, or the `error`."""

    at: AwareDatetime
    seconds: float
    status: int | None = None
    error: str | None = None
    response: str | None = Field(
        None,
        description="The start of the answer's body, made printable. It is kept of public addresses alone.",
    )


CallbackState = Literal["waiting", "delivered", "failed"]


class CallbackRecord(Record):
    """The record of a callback. `body` is there only after it was given up, for a resend."""

    callback_id: str
    tenant: Tenant
    subject_kind: SubjectKind
    subject_id: TaskId
    event: str
    url: HttpText
    state: CallbackState
    attempts: tuple[CallbackAttempt, ...] = ()
    next_at: AwareDatetime | None = Field(None, description="When the next attempt is due, roughly.")
    reason: str | None = Field(None, description="Why it was given up, or why it waits.")
    resent_at: AwareDatetime | None = Field(None, description="When its owner last asked for a resend.")
    updated_at: AwareDatetime
    body: str | None = None


def callback_id(tenant: str, kind: SubjectKind, subject_id: str, event: str, *parts: str | int | None) -> str:
    """The id of an event of a task or batch. `parts` distinguish events of the same name."""
    said = json.dumps([tenant, kind, subject_id, event, *parts])
    return f"msg_{hashlib.sha256(said.encode()).hexdigest()[:32]}"


def task_callback(event: Event, url: str, *parts: str | int | None) -> Callback:
    """The callback for an event of a task. `parts` distinguish events of the same name."""
    data = event.data
    return Callback(
        callback_id=callback_id(data.tenant, "task", data.task_id, event.type, *parts),
        tenant=data.tenant,
        subject_kind="task",
        subject_id=data.task_id,
        event=event.type,
        url=url,
        body=_body(event),
    )


def batch_callback(summary: BatchSummary, url: str) -> Callback:
    """The callback for the end of a batch, made from its summary."""
    event = f"batch.{summary.state}"
    data = summary.model_dump(mode="json", exclude_none=True)
    # Fields with a limit of their own are cut first, so that they push nothing else out.
    data["error"] = data.get("error", "")[: 2 * _ERROR_CHARACTERS] or None
    if "schedule" in data:
        data["schedule"] = data["schedule"][:_SCHEDULE_CHARACTERS]
    document = {
        "type": event,
        "timestamp": data["finished_at"],
        "version": SCHEMA_VERSION,
        "data": data,
    }
    for part in ("metadata", "failures"):
        if len(json.dumps(document).encode()) >= MAX_CALLBACK_BYTES:
            data[part] = {}
            data["truncated"] = [*data.get("truncated", []), part]
    return Callback(
        callback_id=callback_id(summary.tenant, "batch", summary.batch_id, event),
        tenant=summary.tenant,
        subject_kind="batch",
        subject_id=summary.batch_id,
        event=event,
        url=url,
        body=json.dumps(document),
    )


def end_callback(result: Result, url: str, output: bytes | None = None) -> Callback:
    """The callback for the end of a task. One record always gives the same bytes.

    `output` is the output as compact JSON text, for a result without its output.
    """
    return task_callback(Event.of_result(result, output), url, result.redrives, result.digest)


def _body(event: Event) -> str:
    """The event as JSON, below MAX_CALLBACK_BYTES. The output is left out first, then the metadata."""
    left_out: list[Truncated] = list(event.data.truncated)
    text = to_json(event)
    for part in ("output", "metadata", "error"):
        if len(text.encode()) < MAX_CALLBACK_BYTES:
            break
        match part:
            case "output":
                change: dict[str, object] = {"output": None}
            case "metadata":
                change = {"metadata": {}}
            case _:
                error = event.data.error
                if error is None:
                    continue
                short = {
                    "code": error.code[:_ERROR_CHARACTERS],
                    "message": error.message[:_ERROR_CHARACTERS],
                }
                change = {"error": error.model_copy(update=short)}
        if part not in left_out:
            left_out.append(part)
        change["truncated"] = tuple(left_out)
        event = event.model_copy(update={"data": event.data.model_copy(update=change)})
        text = to_json(event)
    return text
