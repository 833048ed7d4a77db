"""The settings of the face-swapping engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class FacefusionSettings(EngineSettings):
    """The face swapper, its device, and the largest picture."""

    facefusion_backend: Literal["preview", "facefusion"] = Field(
        "preview",
        description="The face swapper: `preview` (landmarks, warp and blend on the CPU; its output is marked as a "
        "preview) or `facefusion` (FaceFusion, which you install separately).",
    )
    facefusion_home: Path | None = Field(
        None, description="FaceFusion's folder, with `facefusion.py` and its weights in `.assets/models`."
    )
    facefusion_python: str | None = Field(
        None,
        description="The Python (3.12 or later) of FaceFusion's own environment; the default is "
        "`.venv/bin/python` in its folder, else `python3`.",
    )
    facefusion_resident: bool = Field(
        True,
        description="Whether FaceFusion stays loaded, and serves one task after another. `false` starts it anew for "
        "each task.",
    )
    facefusion_model_dir: Path | None = Field(
        None,
        description="A folder with all of FaceFusion's weights and their `.hash` files, or `weights:NAME` for an "
        "entry of the weights' manifest. FaceFusion then downloads none. Without this setting it uses "
        "`.assets/models` in its folder.",
    )
    facefusion_providers: str = Field(
        "cuda",
        pattern=r"^[a-z][a-z0-9]*(,[a-z][a-z0-9]*)*$",
        description="FaceFusion's execution providers in order of preference, separated by commas: `cuda`, "
        "`tensorrt`, `rocm`, `openvino`, `cpu` …",
    )
    facefusion_max_pixels: int = Field(
        50_000_000,
        ge=1,
        description="The most pixels of a source or target; tasks with larger pictures are refused.",
    )

    @property
    def gpu(self) -> int | None:
        if self.facefusion_backend == "preview":
            return super().gpu
        providers = set(self.facefusion_providers.split(","))
        return 0 if providers & {"cuda", "tensorrt"} and "cpu" not in providers else None
