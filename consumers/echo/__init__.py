"""echo: returns its payload. Checks a deployment, and shows what the queue itself costs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, JsonValue

from inferq.schemas import Task, TaskType


class EchoTask(Task):
    """Sends `payload` back after `delay` seconds."""

    task_type: Literal["echo"]
    payload: JsonValue = None
    delay: float = Field(0.0, ge=0, le=3600, description="Seconds to wait before answering.")


class EchoOutput(BaseModel):
    """The payload, as it came."""

    payload: JsonValue


task_type = TaskType(
    name="echo",
    task=EchoTask,
    output=EchoOutput,
    engine="inferq.consumers.echo.engine:EchoEngine",
    arguments=("payload",),
    summary="returns its payload",
)
