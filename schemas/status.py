"""Where a task stands, and the events that say so while it moves."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from schemas.result import ErrorInfo
from schemas.task import Priority

State = Literal["queued", "running", "retrying", "succeeded", "failed", "cancelled"]
END_STATES: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})


class TaskStatus(BaseModel):
    """What is known of a task at this moment. `progress` runs from 0 to 1."""

    model_config = ConfigDict(frozen=True)

    task_id: str
    task_type: str
    tenant: str
    state: State
    attempt: int = 1
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


EventType = Literal[
    "task.queued", "task.started", "task.progress", "task.retrying",
    "task.succeeded", "task.failed", "task.cancelled",
]  # fmt: skip


class Event(BaseModel):
    """Something that happened to a task, in the shape of a Standard Webhooks payload."""

    model_config = ConfigDict(frozen=True)

    type: EventType
    timestamp: AwareDatetime
    data: EventData


class EventData(BaseModel):
    """The task as the event left it; `output` only where it is small enough to travel inline."""

    model_config = ConfigDict(frozen=True)

    task_id: str
    task_type: str
    tenant: str
    state: State
    attempt: int = 1
    progress: float | None = None
    note: str | None = None
    batch_id: str | None = None
    error: ErrorInfo | None = None
    output: JsonValue = None
    metadata: dict[str, JsonValue] = {}


Event.model_rebuild()
