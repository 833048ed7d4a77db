"""Where a task stands, and the events that say so while it moves."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import AwareDatetime, Field, JsonValue

from inferq.schemas.record import SCHEMA_VERSION, Record
from inferq.schemas.result import OUTPUT_ARTIFACT, ErrorInfo, Result
from inferq.schemas.task import Priority

State = Literal["queued", "running", "retrying", "succeeded", "failed", "cancelled"]
END_STATES: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})


class TaskStatus(Record):
    """What is known of a task at this moment. `progress` runs from 0 to 1."""

    task_id: str
    task_type: str
    tenant: str
    state: State
    attempt: int = 1
    redrives: int = 0
    priority: Priority = "normal"
    progress: float | None = Field(None, ge=0, le=1)
    progress_note: str | None = None
    batch_id: str | None = None
    worker: str | None = None
    error: ErrorInfo | None = None
    created_at: AwareDatetime | None = None
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None
    cancel_requested: bool = False

    @property
    def ended(self) -> bool:
        return self.state in END_STATES

    @classmethod
    def of_result(cls, result: Result) -> TaskStatus:
        """The status that the record of a task's end amounts to."""
        return cls(
            task_id=result.task_id,
            task_type=result.task_type,
            tenant=result.tenant,
            state=result.status,
            attempt=max(result.attempts, 1),
            redrives=result.redrives,
            progress=1.0 if result.status == "succeeded" else None,
            batch_id=result.batch_id,
            worker=result.worker,
            error=result.error,
            created_at=result.created_at,
            started_at=result.started_at,
            finished_at=result.finished_at,
            cancel_requested=result.status == "cancelled",
        )


EventType = Literal[
    "task.queued", "task.started", "task.progress", "task.retrying",
    "task.succeeded", "task.failed", "task.cancelled",
]  # fmt: skip

EVENT_OF_STATE: dict[State, EventType] = {
    "queued": "task.queued",
    "running": "task.started",
    "retrying": "task.retrying",
    "succeeded": "task.succeeded",
    "failed": "task.failed",
    "cancelled": "task.cancelled",
}
"""The event that tells of a task's move into a state."""


def sequence_of(state: State, *, attempt: int, redrives: int, progress: float | None = None) -> int:
    """The place of an event among all events of its task: what happened later has the larger number.

    It counts by redrive, attempt and how far the attempt is; the same event always has the same number.
    Attempts beyond 998 count as 998. A success counts as the last of all attempts and redrives, as it takes
    the place of a failure, which may be a later one's. `progress` is a fraction from 0 to 1.
    """
    attempt = min(attempt, _LAST_ATTEMPT - 1)
    if state == "queued":
        attempt, phase = attempt - 1, _ATTEMPT_ENDED
    elif state == "running":
        phase = 0 if progress is None else 1 + int(min(max(progress, 0.0), 1.0) * _PROGRESS_STEPS)
    elif state == "retrying":
        phase = _ATTEMPT_FAILED
    elif state == "succeeded":
        redrives, attempt, phase = _LAST_REDRIVE, _LAST_ATTEMPT, _ATTEMPT_ENDED
    else:
        phase = _ATTEMPT_ENDED
    return (min(redrives, _LAST_REDRIVE) * (_LAST_ATTEMPT + 1) + attempt) * (_ATTEMPT_ENDED + 1) + phase


_LAST_REDRIVE = 1_000_000
_LAST_ATTEMPT = 999
_PROGRESS_STEPS = 9_996
_ATTEMPT_FAILED = 9_998
_ATTEMPT_ENDED = 9_999

INLINE_EVENT_OUTPUT_BYTES = 8 * 1024
"""The largest output (as JSON) that an event carries."""


Truncated = Literal["output", "metadata", "error"]


class Event(Record):
    """Something that happened to a task, in the shape of a Standard Webhooks payload."""

    type: EventType
    timestamp: AwareDatetime
    version: int = Field(SCHEMA_VERSION, ge=1, description="The version of this form; 1 if absent.")
    data: EventData

    @classmethod
    def of_result(cls, result: Result, output: bytes | None = None) -> Event:
        """The event of a task's end, with its output where that is small enough to travel inline.

        `output` is the output as compact JSON text, where the result itself leaves it out.
        """
        # A large one is an artifact, of which an event says nothing.
        value, small = result.output, all(artifact.name != OUTPUT_ARTIFACT for artifact in result.artifacts)
        if output is not None:
            # One of more than twice the size is too large however it is written, and not worth reading.
            small = len(output) <= 2 * INLINE_EVENT_OUTPUT_BYTES
            value = json.loads(output) if small else None
        small = small and len(json.dumps(value)) <= INLINE_EVENT_OUTPUT_BYTES
        return cls(
            type=EVENT_OF_STATE[result.status],
            timestamp=result.finished_at,
            data=EventData(
                task_id=result.task_id,
                task_type=result.task_type,
                tenant=result.tenant,
                state=result.status,
                attempt=max(result.attempts, 1),
                sequence=sequence_of(
                    result.status, attempt=max(result.attempts, 1), redrives=result.redrives
                ),
                progress=1.0 if result.status == "succeeded" else None,
                batch_id=result.batch_id,
                error=result.error,
                output=value if small else None,
                metadata=result.metadata,
                truncated=() if small else ("output",),
            ),
        )


class EventData(Record):
    """The task as the event left it; `output` only where it is small enough to travel inline."""

    task_id: str
    task_type: str
    tenant: str
    state: State
    attempt: int = 1
    sequence: int = Field(0, description="Larger for what happened to the task later; the order to go by.")
    progress: float | None = None
    note: str | None = None
    batch_id: str | None = None
    error: ErrorInfo | None = None
    output: JsonValue = None
    metadata: dict[str, JsonValue] = Field({})
    truncated: tuple[Truncated, ...] = Field(
        (), description="What was left out, or of `error` shortened, to keep the event small."
    )


Event.model_rebuild()
