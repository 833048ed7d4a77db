"""A task type whose engine takes the time of a GPU, and computes nothing: n tasks together in (a + b·n) seconds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from inferq.schemas import Settings, Task, TaskType


class SimGpuTask(Task):
    task_type: Literal["simgpu"]
    payload: str = ""


class SimGpuOutput(BaseModel):
    """When the computation of the task's batch began (Unix seconds), what it took, and how many tasks it had."""

    began: float
    seconds: float
    batch: int


class SimGpuSettings(Settings):
    simgpu_batch: float = Field(0.02, ge=0, description="Seconds that each batch takes: a.")
    simgpu_task: float = Field(0.001, ge=0, description="Seconds that each task takes beside it: b.")


task_type = TaskType(
    name="simgpu",
    task=SimGpuTask,
    output=SimGpuOutput,
    engine="simgpu.engine:SimGpuEngine",
    settings=SimGpuSettings,
)
