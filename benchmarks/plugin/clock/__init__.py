"""A task type whose output is its start time, to measure the queue's overhead."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from inferq.schemas import Task, TaskType


class ClockTask(Task):
    task_type: Literal["clock"]
    payload: str = ""


class ClockOutput(BaseModel):
    started: float
    payload: str


task_type = TaskType(name="clock", task=ClockTask, output=ClockOutput, engine="clock.engine:ClockEngine")
