"""The settings of the music engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class AceStepSettings(EngineSettings):
    """The music backend, its weights and its device."""

    acestep_backend: Literal["preview", "diffusers"] = Field(
        "preview",
        description="The music backend: `preview` (a simple synthesizer without AI and weights) or `diffusers` "
        "(the ACE-Step model).",
    )
    acestep_model_dir: Path | None = Field(
        None,
        description="ACE-Step's weights: a folder in the layout of diffusers with a `model_index.json`, or "
        "`weights:NAME` for an entry of the weights' manifest.",
    )
    acestep_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None,
        description="The number format of ACE-Step's computation, as INFERQ_PRECISION and under torch's names; the "
        "default is `bfloat16` on a GPU, `float32` on the CPU.",
    )
    acestep_cpu_offload: bool = Field(
        False,
        description="Whether ACE-Step's parts stay in main memory until the GPU needs them. This takes less GPU "
        "memory and is slower.",
    )
