"""echo: returns its payload. Use it to check a deployment and to measure the queue's overhead.

engine  the echo engine
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, JsonValue

from inferq.schemas import Task, TaskType


class EchoTask(Task):
    """Returns `payload` after `delay` seconds."""

    task_type: Literal["echo"]
    payload: JsonValue = None
    delay: float = Field(0.0, ge=0, le=3600, description="Seconds to wait before the result.")


class EchoOutput(BaseModel):
    """The unchanged payload."""

    payload: JsonValue


task_type = TaskType(
    name="echo",
    task=EchoTask,
    output=EchoOutput,
    engine="inferq.consumers.echo.engine:EchoEngine",
    arguments=("payload",),
    summary="returns its payload",
)
