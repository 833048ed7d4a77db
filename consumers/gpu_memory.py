"""A share of a GPU's memory: how each framework is limited to it, and whether the shares of a worker fit.

A limit bounds what the framework allocates. CUDA's own context and the workspaces of its libraries, some hundred
megabytes for each process, are not part of it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from inferq.consumers.engine import EngineSettings
from inferq.consumers.machine import gpu_fault, gpu_memory_bytes
from inferq.schemas import InstallationError, Settings

_PADDLE_LIMIT = "FLAGS_gpu_memory_limit_mb"

_ROUNDING = 1e-9
"""Ten times 0.1 is not quite 1."""


def require_room(engines: Iterable[Settings | None], *, at_once: int | None = None) -> None:
    """Refuse to start if engines that are loaded at the same time would share out more than a GPU's memory.

    `engines` has the settings of each engine process: those of a type, once for each slot. At most `at_once` of them
    are loaded at a time (None: all). Raises InstallationError.
    """
    shares = [
        (settings.gpu, settings.gpu_memory_fraction)
        for settings in engines
        if isinstance(settings, EngineSettings)
        and settings.gpu is not None
        and settings.gpu_memory_fraction is not None
    ]
    for (gpu, fraction), processes in Counter(shares).items():
        count = min(processes, at_once or processes)
        if count * fraction > 1 + _ROUNDING:
            fit, least = int((1 + _ROUNDING) / fraction), math.floor(100 / count) / 100
            raise InstallationError(
                f"{count} slots × INFERQ_GPU_MEMORY_FRACTION={fraction:g} would take {count * fraction:g} of the "
                f"memory of GPU {gpu}, and 1 is all of it: set INFERQ_SLOTS to at most {fit}, or "
                f"INFERQ_GPU_MEMORY_FRACTION to at most {least:g}",
                code="bad_settings",
            )


def limit_torch_memory(torch: Any, device: str, fraction: float | None) -> None:
    """Limit torch's allocator on `device` (`cuda:N`). Call this before the weights are loaded.

    https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.set_per_process_memory_fraction.html
    """
    if fraction is not None and device != "cpu":
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def limit_paddle_memory(gpu: int | None, fraction: float | None) -> None:
    """Limit paddle's allocators. Call this before paddle is imported: it reads the flag then.

    `FLAGS_fraction_of_gpu_memory_to_use` would only size the first block: after it, paddle allocates more.
    """
    if fraction is not None and gpu is not None:
        os.environ[_PADDLE_LIMIT] = str(_share(gpu, fraction) >> 20)


def onnxruntime_cuda_options(gpu: int, fraction: float | None, *, sessions: int = 1) -> dict[str, Any]:
    """Options of onnxruntime's CUDAExecutionProvider for each of an engine's `sessions`: its GPU and its limit.

    Each session has an arena of its own, so each gets an equal part. An arena that doubled itself would reach its
    limit with half of it unused. https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
    """
    options: dict[str, Any] = {"device_id": gpu}
    if fraction is not None:
        options["gpu_mem_limit"] = _share(gpu, fraction) // sessions
        options["arena_extend_strategy"] = "kSameAsRequested"
    return options


def _share(gpu: int, fraction: float) -> int:
    """The share in bytes. Raises InstallationError if there is no such GPU."""
    if (fault := gpu_fault(gpu)) is not None:
        raise InstallationError(
            f"INFERQ_GPU_MEMORY_FRACTION is for GPU {gpu}, but {fault}", code="device_unavailable"
        )
    return int(gpu_memory_bytes(gpu) * fraction)
