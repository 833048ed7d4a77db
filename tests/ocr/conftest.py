"""A loaded OCR engine, and the sample pages with the lines that stand on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inferq.consumers.engine import Context, InputFile
from inferq.consumers.ocr import OcrOutput, OcrTask
from inferq.consumers.ocr.engine import OcrEngine

PAGES = Path(__file__).parents[2] / "examples" / "pages"


@dataclass(frozen=True)
class Sample:
    """A sample page: its picture, and its lines in reading order."""

    path: Path
    lines: list[str]

    @property
    def image(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")

    def top(self, lines: int, height: int, folder: Path) -> Sample:
        """The same page cut off below its first lines, which are read in a fraction of the time."""
        image = self.image
        file = folder / f"top-of-{self.path.name}"
        image.crop((0, 0, image.width, height)).save(file)
        return Sample(file, self.lines[:lines])


def sample(name: str) -> Sample:
    return Sample(PAGES / f"{name}.png", (PAGES / f"{name}.txt").read_text("utf-8").splitlines())


@pytest.fixture
def invoice() -> Sample:
    return sample("invoice")


@pytest.fixture
def notice() -> Sample:
    return sample("notice")


@pytest.fixture
def heading(notice: Sample, tmp_path: Path) -> Sample:
    """The first four lines of the notice."""
    return notice.top(4, 340, tmp_path)


@pytest.fixture(scope="session")
def engine() -> Iterator[OcrEngine]:
    """RapidOCR on the CPU, loaded once."""
    engine = OcrEngine()
    engine.load()
    yield engine
    engine.close()


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """A context for an input file; `reports` collects the progress, `abort` says when to stop."""

    def make(
        path: Path,
        reports: list[tuple[float, str]] | None = None,
        abort: Callable[[], bool] = lambda: False,
    ) -> Context:
        collected = reports if reports is not None else []
        return Context(
            folder=tmp_path,
            inputs={"image_url": InputFile(path, path.stat().st_size, "application/octet-stream")},
            report=lambda fraction, note: collected.append((fraction, note)),
            abort_requested=abort,
        )

    return make


@pytest.fixture
def read(engine: OcrEngine, make_context: Callable[..., Context]) -> Callable[..., OcrOutput]:
    """Runs the engine on a file."""

    def run(path: Path, **options: Any) -> OcrOutput:
        return engine.run(ocr_task(**options), make_context(path))

    return run


def ocr_task(**options: Any) -> OcrTask:
    return OcrTask.model_validate(
        {"task_id": "t", "task_type": "ocr", "image_url": "https://example.com/a.png", "options": options}
    )
