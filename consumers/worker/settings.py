"""The worker's settings."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator
from pydantic_settings import NoDecode

from inferq.consumers.probes.settings import ProbeSettings
from inferq.consumers.runtime.settings import EngineProcessSettings
from inferq.schemas import PRIORITIES, Priority


class WorkerSettings(ProbeSettings, EngineProcessSettings):
    """The settings of a worker."""

    worker_name: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        description="The name of this worker in results, dead letters and logs.",
    )
    track: str = Field(
        "",
        pattern=r"^[a-z0-9-]{0,32}$",
        description="A short label such as `canary`, for workers whose code or weights you compare with others "
        "(default: none). Results, metrics, logs and the list of workers have it.",
    )
    lanes: Annotated[tuple[Priority, ...], NoDecode] = Field(
        PRIORITIES, min_length=1, description="The priorities that this worker serves, separated by commas."
    )
    slots: int = Field(
        1, ge=1, le=64, description="Tasks that run at a time. Each slot has its own engine process."
    )
    take_ahead: int = Field(
        0,
        ge=0,
        le=8,
        description="How many tasks a slot takes while its engine computes another, unless another worker is idle. The "
        "slot then fetches inputs and stores results while the engine computes. Over a slow network set 2. `true` is "
        "1, `false` is 0. An engine that computes several tasks together takes at least one batch ahead.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="The most tasks that an engine computes together (default: the engine's own number, 1 for those "
        "that compute one at a time). A slot then has at most two such batches in hand.",
    )
    batch_wait: float = Field(
        0.005,
        ge=0,
        le=60,
        description="Seconds between two looks for tasks that can join a batch while it waits for its engine. The "
        "engine waits no longer than this for a batch that could grow; 0: a batch does not grow.",
    )
    oldest_first: bool = Field(
        False,
        description="Whether idle workers get tasks in the order in which they started. Without it they take turns. "
        "Scale-in then removes workers that get no task; see the scale-in guard.",
    )
    max_attempts: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Attempts before a task fails for good (default: the type's, mostly 5).",
    )
    redis_patience: float = Field(
        20.0,
        ge=0,
        description="Seconds that a worker waits for an unavailable Redis; then it continues without Redis. "
        "0: it never waits.",
    )
    result_cache: bool = Field(
        False,
        description="Whether a task takes the result of an equal, earlier task of the same tenant instead of a "
        "run of the engine.",
    )
    grace_seconds: float = Field(
        30.0, ge=0, description="Seconds that a running task may continue after SIGTERM; then it is requeued."
    )
    exit_idle: float | None = Field(
        None,
        gt=0,
        description="Seconds without a task in hand and without one waiting, after which the worker exits with "
        "status 0 (default: never). For Kubernetes Jobs; what restarts its containers would restart it.",
    )
    engine_load: Literal["eager", "lazy"] = Field(
        "eager",
        validation_alias="INFERQ_LOAD",  # `load` is a method of all settings
        description="When a worker loads its engine: before it takes tasks (`eager`), or for its first task (`lazy`).",
    )
    idle_unload: float | None = Field(
        None,
        gt=0,
        description="Seconds without a task after which an engine's process ends, which frees the GPU (default: "
        "never). The next task loads the engine again.",
    )
    max_loaded: int | None = Field(
        None,
        ge=1,
        description="The most engine processes of a worker that are loaded at a time (default: all). With fewer than "
        "it has slots, engines load for tasks, and the least recently used one is unloaded for that.",
    )
    start_limit: float = Field(
        600.0, gt=0, description="Seconds that an engine may take to load and warm up."
    )
    abort_grace: float = Field(
        1.0,
        ge=0,
        description="Seconds that an engine has to stop a run that is cancelled or over its time limit. Then "
        "its process is killed.",
    )
    max_time_limit: float = Field(
        86_400.0,
        gt=0,
        le=86_400,
        description="The most seconds that one run may take, whatever time limit the task or its type has.",
    )
    engine_memory_limit: ByteSize | None = Field(
        None,
        gt=0,
        description="The most memory of an engine process and its children in a run, such as `12GB` or "
        "`12GiB` (default: what the loaded engine takes, and 90% of the remaining memory of the machine or "
        "container). Above it, the process is killed and replaced, and the attempt fails.",
    )
    engine_recycle_memory: ByteSize | None = Field(
        None,
        gt=0,
        description="Memory above which an engine process is replaced after its task, such as `10GB` (default: "
        "never). It is closed before the new one loads.",
    )
    engine_max_tasks: int | None = Field(
        None,
        ge=1,
        description="Tasks after which an engine process is replaced (default: never). The new one loads "
        "beside it.",
    )
    scratch_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()),
        description="The folder for the inputs and outputs of a run.",
    )
    metrics_tenants: int = Field(
        50,
        ge=0,
        description="How many tenants a worker's metrics name. Later tenants count as `other`.",
    )

    @field_validator("engine_memory_limit", "engine_recycle_memory", mode="before")
    @classmethod
    def _as_kubernetes_writes_it(cls, value: Any) -> Any:
        return f"{value}B" if isinstance(value, str) and value.endswith("i") else value

    @field_validator("take_ahead", mode="before")
    @classmethod
    def _as_number(cls, value: Any) -> Any:
        words = {"true": 1, "yes": 1, "on": 1, "false": 0, "no": 0, "off": 0}
        return words.get(value.strip().lower(), value) if isinstance(value, str) else value

    @field_validator("lanes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("lanes", mode="after")
    @classmethod
    def _most_urgent_first(cls, value: tuple[Priority, ...]) -> tuple[Priority, ...]:
        return tuple(priority for priority in PRIORITIES if priority in value)
