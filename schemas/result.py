"""How a task ends: one result, or one failure with its reason."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, Field, JsonValue

from inferq.schemas.errors import InferqError, InvalidTask
from inferq.schemas.record import SCHEMA_VERSION, Record
from inferq.schemas.task import Task, TaskId, Tenant

EndState = Literal["succeeded", "failed", "cancelled"]


class Artifact(Record):
    """A file that a task made, stored beside its result."""

    name: str
    url: str
    content_type: str
    bytes: int
    sha256: str


class Timings(Record):
    """Seconds per stage of the last attempt. `queued` counts from the creation of the task."""

    queued: float | None = None
    fetch: float = 0.0
    inference: float = 0.0
    upload: float = 0.0


class EngineInfo(Record):
    """The engine that computed the output."""

    name: str
    version: str
    model: str
    device: str
    weights: tuple[str, ...] = Field((), description="The named weights in use, as `name version`.")
    precision: str | None = Field(
        None,
        description="The number format of the computation: `fp32`, `fp16`, `bf16` or `int8`; null if the engine "
        "does not say.",
    )


OUTPUT_ARTIFACT = "output.json"
"""The artifact that holds an output which is too large for the result itself."""


class ErrorInfo(Record):
    """Why a task failed. `retryable` tells whether a redrive may succeed."""

    code: str
    message: str
    retryable: bool

    @classmethod
    def of(cls, error: InferqError) -> ErrorInfo:
        retryable = not isinstance(error, InvalidTask)
        return cls(code=error.code, message=error.message[:4000], retryable=retryable)


class Result(Record):
    """The record of the end of a task: `result.json` if it succeeded, else `failure.json`."""

    task_id: TaskId
    task_type: str = Field(
        # One pattern, as clients generated from a union of two strings cannot read it.
        pattern=r"^([a-z][a-z0-9_-]{0,62})?$",
        description="Empty if the message was unreadable.",
    )
    tenant: Tenant
    status: EndState
    output: JsonValue = None
    artifacts: tuple[Artifact, ...] = ()
    attempts: int = Field(ge=0)
    timings: Timings = Timings()
    engine: EngineInfo | None = None
    error: ErrorInfo | None = None
    batch_id: str | None = None
    batch_line: int | None = None
    metadata: dict[str, JsonValue] = Field({})
    worker: str | None = None
    track: str | None = Field(None, description="The worker's `INFERQ_TRACK`; None if it has none.")
    created_at: AwareDatetime | None = None
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime
    digest: str | None = Field(
        None, description="SHA-256 of the task's content. None if the message was unreadable."
    )
    cached: bool = Field(
        False, description="Whether the result cache answered, from another task of the tenant."
    )
    batch_size: int = Field(
        1,
        ge=1,
        description="How many tasks the engine computed together; `timings.inference` is this one's share.",
    )
    redrives: int = Field(0, ge=0, description="How often the task was redriven before it ended.")
    trace_id: str | None = Field(None, description="The trace of the task, in 32 hexadecimal digits.")
    version: int = Field(SCHEMA_VERSION, ge=1, description="The version of this form; 1 if absent.")

    @classmethod
    def failure(
        cls,
        task: Task,
        error: InferqError,
        *,
        attempts: int,
        finished_at: datetime,
        digest: str | None = None,
        status: EndState = "failed",
        timings: Timings | None = None,
        engine: EngineInfo | None = None,
        worker: str | None = None,
        track: str | None = None,
        started_at: datetime | None = None,
        redrives: int = 0,
        trace_id: str | None = None,
    ) -> Result:
        """The record of a `task` that ended without an output. `digest` is made here if absent."""
        return cls(
            task_id=task.task_id,
            task_type=task.task_type,
            tenant=task.tenant,
            status=status,
            attempts=attempts,
            timings=timings or Timings(),
            engine=engine,
            error=ErrorInfo.of(error),
            batch_id=task.batch_id,
            batch_line=task.batch_line,
            metadata=task.metadata,
            worker=worker,
            track=track,
            created_at=task.created_at,
            started_at=started_at,
            finished_at=finished_at,
            digest=digest or task.digest(),
            redrives=redrives,
            trace_id=trace_id,
        )
