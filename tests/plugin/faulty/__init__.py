"""A task type that fails on demand: a separate distribution that tests add to the path."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from inferq.schemas import InputUrl, Options, Task, TaskType, always

Fault = Literal[
    "none", "crash", "exit", "kill_worker", "hang", "hang_hard", "invalid", "transient", "error", "memory",
    "artifact", "missing_artifact", "progress", "big", "bad_output", "noise", "gate", "gpu_memory", "swell",
    "grow", "illegible", "stumble", "cut_and_die", "cut_and_stay", "endless_message", "batch_error",
    "batch_memory",
]  # fmt: skip


class FaultyOptions(Options):
    times: int = 10_000
    """The number of attempts that fail, counted by the marker file."""
    marker: str | None = None
    megabytes: int = 0
    """The memory that a run with the fault `swell` or `grow` allocates; after `grow` the engine keeps it."""
    gate: str | None = None
    """The file that a run with the fault `gate` waits for."""
    daemon: str | None = None
    """The file for the pid of a daemon that the run leaves: in a session of its own, its parent gone."""
    helpers: str | None = None
    """The file for the pids of the processes that the run leaves: a fork of the engine, and a program."""
    key: str | None = None
    """Which tasks go together in a batch: those with the same key."""
    fits: int = 1
    """The largest batch for which the memory lasts, with the fault `batch_memory`."""


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
