"""The OCR engine: pages in, lines out, with any of the OCR libraries."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.media.decoder import DecodedFile, Decoder
from inferq.consumers.ocr import FailedPage, OcrOptions, OcrOutput, OcrTask, Page
from inferq.consumers.ocr.annotate import artifact_name, draw_boxes
from inferq.consumers.ocr.backend import Backend, RgbPage
from inferq.consumers.ocr.layout import reading_order
from inferq.consumers.ocr.selection import select_pages
from inferq.consumers.ocr.settings import OcrSettings
from inferq.consumers.weights.cache import model_folder
from inferq.engine import Context, Engine
from inferq.schemas import EngineInfo, InvalidTask

_DECODING_SHARE = 0.5
"""The share of a task's time limit that its file may take to decode. A slow file is refused, not retried."""


class OcrEngine(Engine[OcrTask]):
    """Reads documents page by page; one page is in memory at a time."""

    def __init__(self, settings: OcrSettings | None = None, *, backend: Backend | None = None) -> None:
        """`settings` default to the environment's. `backend`: a loaded one; else `load` loads it."""
        settings = self._settings = settings or OcrSettings.load()
        self._loaded = backend
        self._decoder = Decoder(
            "inferq.consumers.ocr.images:open_with",
            {"max_pixels": settings.ocr_max_pixels, "dpi": settings.ocr_dpi},
            max_pixels=settings.ocr_max_pixels,
        )

    def load(self) -> EngineInfo:
        """Load the library that INFERQ_OCR_BACKEND names onto the device that INFERQ_DEVICE names."""
        self._loaded = load_backend(self._settings)
        self._decoder.start()
        return self._loaded.info

    def warm_up(self) -> None:
        """Read a generated page: libraries choose kernels and allocate memory on their first page."""
        self._backend.read(_sample_page())

    def run(self, task: OcrTask, context: Context) -> OcrOutput:
        """Read the pages that the task selects. A bad page does not cost the others."""
        path = context.inputs["image_url"].path
        seconds = _DECODING_SHARE * context.time_limit
        with self._decoder.open(path, seconds=seconds, check=context.check_abort) as document:
            numbers = self._choose_pages(task.options.pages, document)
            pages: list[Page] = []
            failed: list[FailedPage] = []
            for done, number in enumerate(numbers):
                context.check_abort()
                context.progress(done / len(numbers), f"page {number} of {document.page_count}")
                try:
                    image = document.page(number)
                except InvalidTask as error:
                    failed.append(FailedPage(page=number, code=error.code, message=error.message))
                    continue
                pages.append(self._read(image, number, task.options, context))
        if not pages:
            raise InvalidTask(failed[0].message, code=failed[0].code)
        context.progress(1.0, "read")
        return OcrOutput(
            text="\n\n".join(page.text for page in pages if page.text),
            page_count=document.page_count,
            pages=tuple(pages),
            failed_pages=tuple(failed),
        )

    def close(self) -> None:
        self._decoder.close()
        self._loaded = None

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise RuntimeError("the OCR engine is not loaded: call load() first")
        return self._loaded

    def _choose_pages(self, selection: str | None, document: DecodedFile) -> list[int]:
        numbers = select_pages(selection, document.page_count)
        if len(numbers) > self._settings.ocr_max_pages:
            raise InvalidTask(
                f"the task selects {len(numbers)} pages, but a task may read at most {self._settings.ocr_max_pages}: "
                f"select fewer in options.pages (or raise INFERQ_OCR_MAX_PAGES)",
                code="too_many_pages",
            )
        return numbers

    def _read(self, image: RgbPage, number: int, options: OcrOptions, context: Context) -> Page:
        lines = reading_order([line for line in self._backend.read(image) if line.score >= options.min_score])
        if options.annotated:
            draw_boxes(image, lines, context.artifact(artifact_name(number), "image/png"))
        return Page(
            page=number,
            width=image.shape[1],
            height=image.shape[0],
            text="\n".join(line.text for line in lines),
            lines=tuple(lines),
        )


def load_backend(settings: OcrSettings) -> Backend:
    """The backend that the settings name, with its models loaded.

    Raises InstallationError if the library or the device is missing; it never falls back to another one.
    """
    threads = settings.ocr_threads or len(os.sched_getaffinity(0))
    if settings.ocr_backend == "paddleocr":
        from inferq.consumers.ocr.paddle import PaddleBackend, offered

        on = settings.ocr_device or settings.device
        precisions = offered(settings.device, settings.ocr_device)
        return PaddleBackend(
            device=settings.device,
            computes_with=settings.ocr_device,
            threads=threads,
            model_dir=settings.ocr_model_dir and model_folder(settings.ocr_model_dir),
            detect_megapixels=settings.ocr_detect_megapixels,
            precision=settings.pick_precision(precisions, f"PaddleOCR on {on}"),
            gpu_memory_fraction=settings.gpu_memory_fraction,
        )
    settings.pick_precision(["fp32"], "RapidOCR")
    from inferq.consumers.ocr.rapid import RapidBackend

    device = settings.device
    if settings.ocr_device == "cpu" or (settings.ocr_device == "gpu" and device == "cpu"):
        device = settings.ocr_device
    return RapidBackend(
        device=device,
        threads=threads,
        detect_megapixels=settings.ocr_detect_megapixels,
        gpu_memory_fraction=settings.gpu_memory_fraction,
    )


def _sample_page() -> RgbPage:
    picture = Image.new("RGB", (1240, 1000), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(28)
    for row in range(12):
        pen.text((80, 60 + 75 * row), f"{row}: a line to warm up with, 0123456789", font=font, fill="black")
    return np.array(picture, np.uint8)
