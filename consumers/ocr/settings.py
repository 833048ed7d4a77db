"""The settings of the OCR engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class OcrSettings(EngineSettings):
    """Which OCR runs, on what, and how much one input may ask of it."""

    ocr_backend: Literal["rapidocr", "paddleocr"] = Field(
        "rapidocr", description="What reads the text: `rapidocr` (weights in its wheel) or `paddleocr`."
    )
    ocr_device: Literal["cpu", "gpu", "onnxruntime"] | None = Field(
        None,
        description="What OCR computes with, where it differs from INFERQ_DEVICE: the `cpu`, the `gpu`, or "
        "(PaddleOCR) `onnxruntime` on that device, which needs no paddlepaddle.",
    )
    ocr_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads that OCR computes with; the default is one per core."
    )
    ocr_model_dir: Path | None = Field(
        None,
        description="PaddleOCR's weights: a folder with one model folder for detection and one for "
        "recognition (`…_det`, `…_rec`); with one for orientation too (`…_textline_ori`), lines that stand "
        "on their heads are read. It may also be `weights:NAME` of the weights' manifest. Without a folder, "
        "PaddleOCR uses its own cache, and downloads.",
    )
    ocr_max_pixels: int = Field(
        100_000_000, ge=1, description="The largest page that is decoded, in pixels; larger ones are refused."
    )
    ocr_max_pages: int = Field(
        500, ge=1, description="How many pages one OCR task may read; more are refused."
    )
    ocr_dpi: int = Field(
        200, ge=36, le=1200, description="Dots per inch at which the pages of a PDF are drawn."
    )
    ocr_detect_megapixels: float = Field(
        5.0,
        ge=0.25,
        le=200,
        description="Larger pages are scaled down to this many megapixels to find their lines, which are "
        "then read at full size. More finds smaller print, and costs time and memory in proportion.",
    )
