"""A task type that fails on demand: a distribution of its own, put on the path by tests."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from inferq.schemas import InputUrl, Options, Task, TaskType, always

Fault = Literal[
    "none", "crash", "exit", "kill_worker", "hang", "hang_hard", "invalid", "transient", "error", "memory",
    "artifact", "missing_artifact", "progress", "big", "bad_output", "noise", "gate", "gpu_memory", "swell",
    "grow", "illegible",
]  # fmt: skip


class FaultyOptions(Options):
    times: int = 10_000
    """How many attempts, by the marker file, the fault befalls."""
    marker: str | None = None
    megabytes: int = 0
    """How much a run with the fault `swell` or `grow` takes; the engine keeps it after `grow`."""
    gate: str | None = None
    """The file that a run with the fault `gate` waits for."""
    helpers: str | None = None
    """The file for the pids of what the run starts and leaves behind: a fork of the engine, and a program."""


class FaultyTask(Task):
    task_type: Literal["faulty"]
    fault: Fault = "none"
    file_url: InputUrl | None = None
    options: FaultyOptions = FaultyOptions()


class FaultyOutput(BaseModel):
    value: str


task_type = TaskType(
    name="faulty",
    task=FaultyTask,
    output=FaultyOutput,
    engine="faulty.engine:FaultyEngine",
    time_limit=20,
    cacheable=always,
)
