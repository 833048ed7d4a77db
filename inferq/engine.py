"""What a task type and its engine import: the type's description, the engine protocol, and the errors of a run.

A task type is a package with a `TaskType` that describes it, an entry point in the group `inferq.engines`, and
an `Engine`. docs/task-types.md leads through one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inferq.consumers.engine import (
    ArtifactFile,
    Context,
    Engine,
    EngineSettings,
    InputFile,
    Precision,
    TaskAborted,
)
from inferq.consumers.gpu_memory import limit_paddle_memory, limit_torch_memory, onnxruntime_cuda_options
from inferq.schemas import (
    EngineInfo,
    InferqError,
    InputUrl,
    InstallationError,
    InvalidTask,
    Options,
    Settings,
    Task,
    TaskType,
    TransientFailure,
)

if TYPE_CHECKING:
    from inferq.consumers.weights.cache import LoadedWeights, model_folder, use_weights

__all__ = [
    "ArtifactFile",
    "Context",
    "Engine",
    "EngineInfo",
    "EngineSettings",
    "InferqError",
    "InputFile",
    "InputUrl",
    "InstallationError",
    "InvalidTask",
    "LoadedWeights",
    "Options",
    "Precision",
    "Settings",
    "Task",
    "TaskAborted",
    "TaskType",
    "TransientFailure",
    "limit_paddle_memory",
    "limit_torch_memory",
    "model_folder",
    "onnxruntime_cuda_options",
    "use_weights",
]


def __getattr__(name: str) -> Any:
    # Weights need the object stores, which a gateway that only knows the type does not load.
    if name in {"LoadedWeights", "model_folder", "use_weights"}:
        from inferq.consumers.weights import cache as weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
