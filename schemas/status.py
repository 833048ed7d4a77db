"""The status of a task, and the events that report its changes."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import AwareDatetime, Field, JsonValue

from inferq.schemas.record import SCHEMA_VERSION, Record
from inferq.schemas.result import OUTPUT_ARTIFACT, ErrorInfo, Result
from inferq.schemas.task import Priority, Task

State = Literal["queued", "running", "retrying", "succeeded", "failed", "cancelled"]
END_STATES: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})


class TaskStatus(Record):
    """The status of a task now. `progress` runs from 0 to 1."""

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
    trace_id: str | None = Field(None, description="The trace of the task, in 32 hexadecimal digits.")

    @property
    def ended(self) -> bool:
        return self.state in END_STATES

    @classmethod
    def of_result(cls, result: Result) -> TaskStatus:
        """The status of a task that has ended, from its record."""
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
            trace_id=result.trace_id,
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
"""The event that reports a task's new state."""


def sequence_of(state: State, *, attempt: int, redrives: int, progress: float | None = None) -> int:
    """The place of an event among all events of its task. Later events have larger numbers.

    The number counts redrives, attempts, and the progress of the attempt. The same event always has the same
    number. Attempts above 998 count as 998. A success counts as the last of all attempts and redrives, because
    it replaces a failure, even one of a later attempt. `progress` is a fraction from 0 to 1.
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
    """A change of a task, in the shape of a Standard Webhooks payload."""

    type: EventType
    timestamp: AwareDatetime
    version: int = Field(SCHEMA_VERSION, ge=1, description="The version of this form; 1 if absent.")
    data: EventData

    @classmethod
    def of_result(cls, result: Result, output: bytes | None = None) -> Event:
        """The event of a task's end. It holds the output if that is small enough.

        `output` is the output as compact JSON text, for a result without its output.
        """
        # A large output is an artifact, and no event names artifacts.
        value, small = result.output, all(artifact.name != OUTPUT_ARTIFACT for artifact in result.artifacts)
        if output is not None:
            # More than twice the limit is too large in any notation, so it is not parsed.
            small = len(output) <= 2 * INLINE_EVENT_OUTPUT_BYTES
            value = json.loads(output) if small else None
        small = small and len(json.dumps(value)) <= INLINE_EVENT_OUTPUT_BYTES
        return cls(
            type=EVENT_OF_STATE[result.status],
            timestamp=result.finished_at,
            data=EventData.of(
                result,
                result.status,
                attempt=max(result.attempts, 1),
                redrives=result.redrives,
                progress=1.0 if result.status == "succeeded" else None,
                error=result.error,
                output=value if small else None,
                metadata=result.metadata,
                truncated=() if small else ("output",),
            ),
        )


class EventData(Record):
    """The task after the event. `output` is there only if it is small enough."""

    task_id: str
    task_type: str
    tenant: str
    state: State
    attempt: int = 1
    sequence: int = Field(0, description="The order of a task's events: later ones have larger numbers.")
    progress: float | None = None
    note: str | None = None
    batch_id: str | None = None
    error: ErrorInfo | None = None
    output: JsonValue = None
    metadata: dict[str, JsonValue] = Field({})
    trace_id: str | None = Field(None, description="The trace of the task, in 32 hexadecimal digits.")
    truncated: tuple[Truncated, ...] = Field(
        (), description="Fields that were left out to keep the event small; `error` is shortened."
    )

    @classmethod
    def of(
        cls,
        task: Task | TaskStatus | Result,
        state: State,
        *,
        attempt: int,
        redrives: int,
        progress: float | None = None,
        trace_id: str | None = None,
        **more: Any,
    ) -> Self:
        """The data of an event of the task. `more`: other fields. A status or result names its trace itself."""
        return cls(
            task_id=task.task_id,
            task_type=task.task_type,
            tenant=task.tenant,
            state=state,
            attempt=attempt,
            sequence=sequence_of(state, attempt=attempt, redrives=redrives, progress=progress),
            progress=progress,
            batch_id=task.batch_id,
            trace_id=trace_id if isinstance(task, Task) else task.trace_id,
            **more,
        )


Event.model_rebuild()
