"""The engine protocol: what a task type's engine implements, and what a run may ask of its surroundings.

An engine lives in a process of its own, which owns the GPU and the model. Its life is
`load` → `warm_up` → `run` once per task → `close`, all on one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field

from inferq.schemas import EngineInfo, Settings, Task

TaskT = TypeVar("TaskT", bound=Task)


class EngineSettings(Settings):
    """What every engine may be told; an engine's own settings derive from this."""

    device: str = Field(
        "cpu",
        pattern=r"^(cpu|gpu|cuda(:[0-9]+)?)$",
        description="What engines compute on: `cpu`, `gpu` (the first), `cuda` or `cuda:N`.",
    )


class TaskAborted(Exception):
    """The run stopped because it was asked to."""


@dataclass(frozen=True)
class InputFile:
    """A fetched input: where it lies, how large it is (bytes), and what its source said that it is."""

    path: Path
    bytes: int
    content_type: str


@dataclass(frozen=True)
class ArtifactFile:
    """A file that the run leaves behind, to be uploaded under `name`."""

    name: str
    path: Path
    content_type: str


@dataclass(frozen=True)
class Context:
    """What one run may ask: its inputs, a scratch folder, and a way to report and to be stopped.

    `folder` is where the scratch folder is, or will be once somebody asks for it.
    """

    folder: Path
    inputs: Mapping[str, InputFile]
    report: Callable[[float, str], None]
    abort_requested: Callable[[], bool]
    artifacts: list[ArtifactFile] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        """A folder of the run's own, for whatever it likes; gone after the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def progress(self, fraction: float, note: str = "") -> None:
        """Say how far the run is, from 0 to 1, and what it is doing."""
        self.report(min(max(fraction, 0.0), 1.0), note)

    def should_abort(self) -> bool:
        """Whether the run was asked to stop; an engine that can stop early asks between its steps."""
        return self.abort_requested()

    def check_abort(self) -> None:
        """Raise TaskAborted if the run was asked to stop; whoever runs the engine expects it."""
        if self.should_abort():
            raise TaskAborted

    def artifact(self, name: str, content_type: str) -> Path:
        """Announce an artifact and get the path to write it to."""
        if not name or name in {".", ".."} or "/" in name or name in {a.name for a in self.artifacts}:
            raise ValueError(f"artifact name {name!r} is empty, taken, or not a plain file name")
        if name in {"result.json", "failure.json"}:
            raise ValueError(f"artifact name {name!r} is reserved for the task's own record")
        folder = self.scratch / "artifacts"
        folder.mkdir(exist_ok=True)
        self.artifacts.append(ArtifactFile(name, folder / name, content_type))
        return folder / name


class Engine(ABC, Generic[TaskT]):
    """Computes the tasks of one type.

    Any method may raise inferq.schemas.InvalidTask (the input will never work) or inferq.schemas.TransientFailure
    (another attempt may). Anything else counts as transient, and is logged with its stack.
    """

    @abstractmethod
    def load(self) -> EngineInfo:
        """Load the model. Raises inferq.schemas.InstallationError where what is installed cannot work."""

    def warm_up(self) -> None:
        """Run once on made-up input, so that the first real task is no slower than the others."""
        return

    @abstractmethod
    def run(self, task: TaskT, context: Context) -> BaseModel | Mapping[str, Any]:
        """Compute one task. Gives the type's output."""

    def close(self) -> None:
        """Release what `load` took."""
        return
