"""The engine protocol: the class that an engine derives from, and the context of a run.

An engine lives in its own process, which owns the GPU and the model. The process calls
`load` → `warm_up` → `run` for each task, or `run_batch` for several → `close`, all on one thread.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from inferq.schemas import EngineInfo, InstallationError, Settings, Task

TaskT = TypeVar("TaskT", bound=Task)

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""A number format that an engine computes in."""


class EngineSettings(Settings):
    """Settings that every engine has. Derive an engine's own settings from this class."""

    device: str = Field(
        "cpu",
        pattern=r"^(cpu|gpu|cuda(:[0-9]+)?)$",
        description="What engines compute on: `cpu`, `gpu` (the first), `cuda` or `cuda:N`.",
    )
    gpu_memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The share of a GPU's memory that the engine of one slot may allocate, such as `0.4` (default: "
        "no limit). A worker whose slots would take more than 1 together does not start.",
    )
    precision: Precision | None = Field(
        None,
        description="The number format that engines compute in: `fp32`, `fp16`, `bf16` or `int8` (default: the "
        "engine's own). An engine that does not have it does not start.",
    )

    @property
    def gpu(self) -> int | None:
        """The number of the GPU that the engine needs; None if it computes on the CPU."""
        return None if self.device == "cpu" else int(self.device.partition(":")[2] or 0)

    def pick_precision(self, offered: Sequence[Precision], engine: str) -> Precision:
        """The precision to compute in: INFERQ_PRECISION, by default the first of `offered`.

        `engine` names the engine and its device in the error. Raises InstallationError if INFERQ_PRECISION is not
        among those offered.
        """
        if self.precision is None:
            return offered[0]
        if self.precision not in offered:
            raise InstallationError(
                f"INFERQ_PRECISION={self.precision}, but {engine} has only {', '.join(offered)}: set one of these, "
                "or leave INFERQ_PRECISION out",
                code="bad_settings",
            )
        return self.precision


class TaskAborted(Exception):
    """Raised by `Context.check_abort` to stop a run. Do not catch it."""


@dataclass(frozen=True)
class InputFile:
    """A fetched input: its path, its size in bytes, and the content type that its source named."""

    path: Path
    bytes: int
    content_type: str


@dataclass(frozen=True)
class ArtifactFile:
    """A file of a run, uploaded as `name` and listed in the result. `Context.artifact` makes it."""

    name: str
    path: Path
    content_type: str


@dataclass(frozen=True)
class Context:
    """One run: its inputs, a scratch folder, progress, and the request to stop.

    An engine uses `inputs` (a file for each input field) and the methods below. The worker sets the other fields:
    `folder` is the path of `scratch`, `report` receives progress, `abort_requested` tells of a request to stop,
    `time_limit` is the run's limit in seconds.
    """

    folder: Path
    inputs: Mapping[str, InputFile]
    report: Callable[[float, str], None]
    abort_requested: Callable[[], bool]
    artifacts: list[ArtifactFile] = field(default_factory=list)
    time_limit: float = math.inf

    @property
    def scratch(self) -> Path:
        """An empty folder for this run. It is made on first use, and deleted after the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def progress(self, fraction: float, note: str = "") -> None:
        """Report progress: a fraction from 0 to 1, and a short note for people."""
        self.report(min(max(fraction, 0.0), 1.0), note)

    def should_abort(self) -> bool:
        """Whether the run should stop, for example on a cancel or at its time limit."""
        return self.abort_requested()

    def check_abort(self) -> None:
        """Raise TaskAborted if the run should stop. Call this between steps shorter than a second."""
        if self.should_abort():
            raise TaskAborted

    def artifact(self, name: str, content_type: str) -> Path:
        """Announce an artifact, and return the path to write it to.

        `name` is a plain file name, unique in the run. Raises ValueError for any other name.
        """
        if not name or name in {".", ".."} or "/" in name or name in {a.name for a in self.artifacts}:
            raise ValueError(f"artifact name {name!r} is empty, taken, or not a plain file name")
        if name in {"result.json", "failure.json"}:
            raise ValueError(f"artifact name {name!r} is reserved for the task's own record")
        folder = self.scratch / "artifacts"
        folder.mkdir(exist_ok=True)
        self.artifacts.append(ArtifactFile(name, folder / name, content_type))
        return folder / name


class Engine(ABC, Generic[TaskT]):
    """Computes the tasks of one type. Derive an engine from `Engine[YourTask]`.

    A method may raise InvalidTask (the input will never work: no retry) or TransientFailure (another attempt may
    work: a retry). Any other exception is retried too, and logged with its stack.

    An engine that computes several small tasks faster together than one by one sets `batch_size` above 1, as a class
    attribute or in `load`, and implements `run_batch`. `run` stays: it computes a task that has no company.
    """

    batch_size: int = 1
    """The most tasks that one `run_batch` takes; 1 if the engine has none. INFERQ_BATCH_SIZE can lower it."""

    @abstractmethod
    def load(self) -> EngineInfo:
        """Load the model, and describe it: each result carries the returned EngineInfo.

        Raises InstallationError if a package, the weights or the device is missing; the worker then ends.
        """

    def warm_up(self) -> None:
        """Run once on made-up input, so that the first task is as fast as the others. Optional."""
        return

    @abstractmethod
    def run(self, task: TaskT, context: Context) -> BaseModel | Mapping[str, Any]:
        """Compute one task, and return the output of its type."""

    def batch_key(self, task: TaskT) -> Hashable:  # noqa: ARG002
        """Which tasks go together: those with equal keys. By default all do."""
        return None

    def run_batch(
        self, tasks: Sequence[TaskT], contexts: Sequence[Context]
    ) -> Sequence[BaseModel | Mapping[str, Any] | Exception]:
        """Compute several tasks of one `batch_key`, and return an output for each, in their order.

        Each task has its own context. An exception in place of an output fails that task alone. If the call itself
        raises, no task is charged with an attempt: `run` computes each of them alone.
        """
        raise NotImplementedError(f"{type(self).__name__} has a batch_size above 1 and no run_batch")

    def close(self) -> None:
        """Release the model and the device. A second call does nothing. Optional."""
        return
