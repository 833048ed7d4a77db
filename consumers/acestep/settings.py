"""The settings of the music engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class AceStepSettings(EngineSettings):
    """Which backend makes the music, and on what."""

    acestep_backend: Literal["preview", "diffusers"] = Field(
        "preview",
        description="What makes the music: `preview` (a simple synthesizer, not AI, no weights) or "
        "`diffusers` (ACE-Step itself).",
    )
    acestep_model_dir: Path | None = Field(
        None,
        description="ACE-Step's weights: a folder in the layout of diffusers, with a `model_index.json`, or "
        "`weights:NAME` of the weights' manifest.",
    )
    acestep_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None,
        description="The numbers that ACE-Step computes with; the default is `bfloat16` on a GPU, `float32` "
        "on the CPU.",
    )
    acestep_cpu_offload: bool = Field(
        False,
        description="Whether ACE-Step's parts wait in main memory until the GPU needs them: slower, and less "
        "GPU memory.",
    )
