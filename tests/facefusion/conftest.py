"""A loaded engine, the sample portraits, and a folder that looks like FaceFusion's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from inferq.consumers.engine import Context, InputFile
from inferq.consumers.facefusion import FacefusionOutput, FacefusionTask
from inferq.consumers.facefusion.engine import FacefusionEngine
from inferq.consumers.media.decoder import Decoder

HERE = Path(__file__).parent
PORTRAITS = Path(__file__).parents[2] / "examples" / "portraits"
COLLINS = PORTRAITS / "portrait_collins.png"
HOPPER = PORTRAITS / "portrait_hopper.jpg"

Pixels = NDArray[np.uint8]


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"), np.uint8)


def facefusion_task(**options: Any) -> FacefusionTask:
    return FacefusionTask.model_validate(
        {
            "task_id": "t",
            "task_type": "facefusion",
            "source_url": "https://example.com/a.png",
            "target_url": "https://example.com/b.png",
            "options": options,
        }
    )


@dataclass
class Run:
    """One run's context, and what came of it."""

    context: Context
    reports: list[tuple[float, str]]
    output: FacefusionOutput | None = None

    @property
    def picture(self) -> Pixels:
        (artifact,) = self.context.artifacts
        return pixels(artifact.path)


@dataclass
class Runner:
    """Runs an engine on files or pixels, in a folder of its own each time."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    def file(self, picture: Path | Pixels | Image.Image, name: str = "a.png", **how: Any) -> Path:
        if isinstance(picture, Path):
            return picture
        inputs = self.folder / "inputs"
        inputs.mkdir(exist_ok=True)
        path = inputs / f"{len(list(inputs.iterdir()))}-{name}"
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **how)
        return path

    def prepare(
        self, source: Path | Pixels, target: Path | Pixels, abort: Callable[[], bool] = lambda: False
    ) -> Run:
        reports: list[tuple[float, str]] = []
        files = {"source_url": self.file(source), "target_url": self.file(target)}
        context = Context(
            folder=self.folder / f"run-{len(self.runs)}",
            inputs={name: InputFile(path, path.stat().st_size, "") for name, path in files.items()},
            report=lambda fraction, note: reports.append((fraction, note)),
            abort_requested=abort,
        )
        self.runs.append(Run(context, reports))
        return self.runs[-1]

    def __call__(
        self,
        engine: FacefusionEngine,
        source: Path | Pixels,
        target: Path | Pixels,
        abort: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> Run:
        run = self.prepare(source, target, abort)
        run.output = engine.run(facefusion_task(**options), run.context)
        return run


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture(scope="session")
def preview() -> Iterator[FacefusionEngine]:
    """The preview, loaded once."""
    engine = FacefusionEngine()
    engine.load()
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def decoder() -> Iterator[Decoder]:
    """A decoder for engines that are made for a test: it takes half a second to start."""
    decoder = FacefusionEngine()._decoder
    yield decoder
    decoder.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the stand-in's facefusion.py, which swaps."""
    home = tmp_path / "facefusion home"
    shutil.copytree(HERE / "standin", home)
    (home / "behaviour").write_text("swap")
    return home
