"""The settings of the face-swapping engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class FacefusionSettings(EngineSettings):
    """What swaps faces, on what, and how large a picture may be."""

    facefusion_backend: Literal["preview", "facefusion"] = Field(
        "preview",
        description="What swaps faces: `preview` (landmarks, warp and blend on the CPU; labelled as a "
        "preview) or `facefusion` (FaceFusion, installed apart).",
    )
    facefusion_home: Path | None = Field(
        None, description="FaceFusion's folder, with `facefusion.py` and its weights in `.assets/models`."
    )
    facefusion_python: str | None = Field(
        None,
        description="The Python (3.12 or later) of FaceFusion's own environment; the default is "
        "`.venv/bin/python` in its folder, else `python3`.",
    )
    facefusion_providers: str = Field(
        "cuda",
        pattern=r"^[a-z][a-z0-9]*(,[a-z][a-z0-9]*)*$",
        description="What FaceFusion computes with, the preferred first, separated by commas: `cuda`, "
        "`tensorrt`, `rocm`, `openvino`, `cpu` …",
    )
    facefusion_max_pixels: int = Field(
        50_000_000,
        ge=1,
        description="The largest source or target that is decoded, in pixels; larger ones are refused.",
    )
