"""The OCR engine: pages in, lines out, with any of the OCR libraries."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.media.decoder import DecodedFile, Decoder
from inferq.consumers.ocr import FailedPage, Line, OcrOutput, OcrTask, Page
from inferq.consumers.ocr.annotate import artifact_name, draw_boxes
from inferq.consumers.ocr.backend import Backend, RgbPage
from inferq.consumers.ocr.layout import reading_order
from inferq.consumers.ocr.selection import select_pages
from inferq.consumers.ocr.settings import OcrSettings
from inferq.consumers.weights.cache import model_folder
from inferq.engine import Context, Engine, TaskAborted
from inferq.schemas import EngineInfo, InvalidTask

_DECODING_SHARE = 0.5
"""The share of a task's time limit that its file may take to decode. A slow file is refused, not retried."""


_BATCH_PIXELS = 40_000_000
"""Pages are read once they have this many pixels together, though the backend would take more of them."""

_DOCUMENT = re.compile(r"data:(application/pdf|image/tiff)|[^?#]*\.(pdf|tiff?)([?#]|$)", re.IGNORECASE)
"""The URL of a file that may have many pages."""


@dataclass
class _Job:
    """A task, the pages that were read so far, and its failure."""

    task: OcrTask
    context: Context
    page_count: int = 0
    pages: list[Page] = field(default_factory=list)
    failed: list[FailedPage] = field(default_factory=list)
    failure: Exception | None = None


@dataclass(frozen=True)
class _Image:
    """A decoded page."""

    job: _Job
    number: int
    pixels: RgbPage


class OcrEngine(Engine[OcrTask]):
    """Reads documents page by page. On a GPU, a few pages are in memory at a time, else one."""

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
        with self._decoder.starting():
            self._loaded = load_backend(self._settings)
        self.batch_size = self._loaded.batch_size
        return self._loaded.info

    def warm_up(self) -> None:
        """Read a generated picture: libraries load code and allocate memory with the first one.

        A GPU also chooses kernels for a size, so it gets a whole page. On a CPU, a page would delay the first task by
        as long as a task takes, and save nothing that one line does not.
        """
        lines = 1 if self._backend.info.device == "cpu" else 12
        self._backend.read([_sample_page(lines)])

    def batch_key(self, task: OcrTask) -> Hashable:
        """Pictures go together, whatever their options. A document may have many pages, so it goes alone."""
        return (task.tenant, task.task_id) if _DOCUMENT.match(task.image_url) else None

    def run(self, task: OcrTask, context: Context) -> OcrOutput:
        """Read the pages that the task selects. A bad page does not cost the others."""
        (outcome,) = self.run_batch([task], [context])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def run_batch(self, tasks: Sequence[OcrTask], contexts: Sequence[Context]) -> list[OcrOutput | Exception]:
        """Read the pages of several tasks, as many together as the backend takes."""
        jobs = [_Job(task, context) for task, context in zip(tasks, contexts, strict=True)]
        together: list[_Image] = []
        with closing(self._images(jobs)) as images:
            for image in images:
                together.append(image)
                pixels = sum(one.pixels.shape[0] * one.pixels.shape[1] for one in together)
                if len(together) == self._backend.batch_size or pixels >= _BATCH_PIXELS:
                    self._read(together)
                    together = []
        self._read(together)
        return [_outcome(job) for job in jobs]

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

    def _images(self, jobs: Sequence[_Job]) -> Generator[_Image, None, None]:
        """The selected pages of each task. A task whose file cannot be read fails alone."""
        for job in jobs:
            try:
                yield from self._images_of(job)
            except Exception as error:
                job.failure = error

    def _images_of(self, job: _Job) -> Iterator[_Image]:
        context = job.context
        path = context.inputs["image_url"].path
        seconds = _DECODING_SHARE * context.time_limit
        with self._decoder.open(path, seconds=seconds, check=context.check_abort) as document:
            job.page_count = document.page_count
            numbers = self._choose_pages(job.task.options.pages, document)
            for done, number in enumerate(numbers):
                context.check_abort()
                context.progress(done / len(numbers), f"page {number} of {document.page_count}")
                try:
                    pixels = document.page(number)
                except InvalidTask as error:
                    job.failed.append(FailedPage(page=number, code=error.code, message=error.message))
                    continue
                yield _Image(job, number, pixels)

    def _read(self, images: Sequence[_Image]) -> None:
        for job in {id(image.job): image.job for image in images}.values():
            if job.failure is None and job.context.should_abort():
                job.failure = TaskAborted()
        images = [image for image in images if image.job.failure is None]
        if not images:
            return
        found = self._backend.read([image.pixels for image in images])
        for image, lines in zip(images, found, strict=True):
            try:
                image.job.pages.append(_page(image, lines))
            except Exception as error:
                image.job.failure = error


def _page(image: _Image, found: Sequence[Line]) -> Page:
    options, pixels = image.job.task.options, image.pixels
    lines = reading_order([line for line in found if line.score >= options.min_score])
    if options.annotated:
        path = image.job.context.artifact(artifact_name(image.number), "image/png")
        draw_boxes(pixels, lines, path)
    return Page(
        page=image.number,
        width=pixels.shape[1],
        height=pixels.shape[0],
        text="\n".join(line.text for line in lines),
        lines=tuple(lines),
    )


def _outcome(job: _Job) -> OcrOutput | Exception:
    if job.failure is not None:
        return job.failure
    if not job.pages:
        return InvalidTask(job.failed[0].message, code=job.failed[0].code)
    job.context.progress(1.0, "read")
    return OcrOutput(
        text="\n\n".join(page.text for page in job.pages if page.text),
        page_count=job.page_count,
        pages=tuple(job.pages),
        failed_pages=tuple(job.failed),
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


def _sample_page(lines: int) -> RgbPage:
    picture = Image.new("RGB", (1240, 100 + 75 * lines), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(28)
    for row in range(lines):
        pen.text((80, 60 + 75 * row), f"{row}: a line to warm up with, 0123456789", font=font, fill="black")
    return np.array(picture, np.uint8)
