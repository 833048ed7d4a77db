"""The settings of the OCR engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class OcrSettings(EngineSettings):
    """The OCR library, its device and models, and the limits for one input."""

    ocr_backend: Literal["rapidocr", "paddleocr"] = Field(
        "rapidocr", description="The OCR library: `rapidocr` (weights in its wheel) or `paddleocr`."
    )
    ocr_device: Literal["cpu", "gpu", "onnxruntime"] | None = Field(
        None,
        description="The device for OCR, if it differs from INFERQ_DEVICE: `cpu` or `gpu`. With PaddleOCR also "
        "`onnxruntime`, which computes on INFERQ_DEVICE and needs no paddlepaddle.",
    )
    ocr_threads: int | None = Field(
        None, ge=1, le=1024, description="Number of CPU threads for OCR; the default is one per core."
    )
    ocr_model_dir: Path | None = Field(
        None,
        description="PaddleOCR's weights: a folder with one model folder for detection (`…_det`) and one for "
        "recognition (`…_rec`). A third one for orientation (`…_textline_ori`) makes upside-down lines "
        "readable. `weights:NAME` names an entry of the weights' manifest. Without this setting, PaddleOCR "
        "uses its own cache and downloads missing models.",
    )
    ocr_max_pixels: int = Field(
        100_000_000, ge=1, description="The most pixels of a page; tasks with larger pages are refused."
    )
    ocr_max_pages: int = Field(
        500, ge=1, description="The most pages that one OCR task may read; tasks with more are refused."
    )
    ocr_dpi: int = Field(
        200, ge=36, le=1200, description="Resolution at which PDF pages are rendered, in dots per inch."
    )
    ocr_detect_megapixels: float = Field(
        5.0,
        ge=0.25,
        le=200,
        description="Larger pages are scaled down to this many megapixels for detection. Recognition uses the "
        "full size. A higher value finds smaller print; time and memory grow in proportion.",
    )

    @property
    def gpu(self) -> int | None:
        if self.ocr_device == "cpu":
            return None
        return 0 if self.ocr_device == "gpu" and super().gpu is None else super().gpu
