"""FaceFusion's real source, where INFERQ_FACEFUSION_HOME names its folder, with tiny weights made here.

INFERQ_FACEFUSION_PYTHON names its Python, as for a worker. The tests write nothing to its folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.facefusion import FaceChoice
from inferq.consumers.facefusion.backend import Backend
from inferq.consumers.facefusion.headless import HeadlessBackend, find_python
from inferq.consumers.facefusion.resident import ResidentBackend
from inferq.schemas import InferqError, InstallationError, TransientFailure
from tests.facefusion.conftest import HERE

SET = os.environ.get("INFERQ_FACEFUSION_HOME", "")
REAL = Path(SET)
PROGRAMS = [name for name in ("curl", "ffmpeg", "ffprobe") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.skipif(not SET, reason="INFERQ_FACEFUSION_HOME does not name FaceFusion's folder"),
    pytest.mark.skipif(bool(SET and PROGRAMS), reason=f"FaceFusion needs {', '.join(PROGRAMS)}"),
]

Pixels = NDArray[np.uint8]
NOTHING = np.zeros((160, 160, 3), np.uint8)
"""A picture on which the tiny weights find no face."""


def flat(*colour: int) -> Pixels:
    picture = np.full((160, 160, 3), colour, np.uint8)
    picture[:20] = 120
    return picture


GREY, BLUE, RED = flat(128, 128, 128), flat(30, 60, 200), flat(250, 10, 10)


@pytest.fixture(scope="module")
def python() -> str:
    return find_python(REAL, os.environ.get("INFERQ_FACEFUSION_PYTHON"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, python: str) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([python, str(HERE / "tiny_weights.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A copy of FaceFusion's source, with tiny weights."""
    home = tmp_path_factory.mktemp("facefusion")
    shutil.copytree(REAL / "facefusion", home / "facefusion", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REAL / "facefusion.py", home)
    shutil.copytree(weights, home / ".assets" / "models")
    return home


@pytest.fixture(scope="module")
def hang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file; while it exists, ffmpeg hangs."""
    folder = tmp_path_factory.mktemp("bin")
    flag = folder / "hang"
    wrapper = folder / "ffmpeg"
    wrapper.write_text(
        f"#!/bin/sh\n[ -e '{flag}' ] && touch '{flag}.reached' && exec sleep 600\n"
        f'exec {shutil.which("ffmpeg")} "$@"\n'
    )
    wrapper.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield flag


@pytest.fixture(scope="module")
def resident(home: Path, python: str, hang: Path) -> Iterator[ResidentBackend]:
    backend = ResidentBackend(home=home, python=python, providers=["cpu"])
    backend.warm_up()
    yield backend
    backend.close()


@pytest.fixture
def swap(tmp_path: Path) -> Callable[..., Any]:
    """Swaps in a new folder each time."""

    def swap(
        backend: Backend,
        source: Pixels = BLUE,
        target: Pixels = GREY,
        face: FaceChoice = "largest",
        abort: Callable[[], bool] = lambda: False,
    ) -> Pixels:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        context = Context(folder, {}, lambda *_: None, abort)
        return backend.swap(source, target, face, context).picture

    return swap


def facefusion(backend: ResidentBackend) -> psutil.Process:
    (process,) = psutil.Process(backend._driver._process.pid).children()
    return process


def test_both_ways_give_the_same_pictures_and_errors(
    home: Path, python: str, resident: ResidentBackend, swap: Callable[..., Any]
) -> None:
    headless = HeadlessBackend(home=home, python=python, providers=["cpu"])
    assert resident.info == headless.info
    first = facefusion(resident)
    pictures = []
    for face in ("largest", "all"):
        one, other = (swap(backend, face=face) for backend in (resident, headless))
        assert (one == other).all()
        pictures.append(one)
    # The large face around (80, 80), the small one around (30, 140): red at the source is blue there.
    assert [[picture[y, x, 2] > 150 for x, y in ((80, 80), (30, 140))] for picture in pictures] == [
        [True, False],
        [True, True],
    ]
    for source, target, code in (
        (NOTHING, GREY, "no_face_found"),
        (BLUE, NOTHING, "no_face_found"),
        (BLUE, RED, "content_refused"),
    ):
        kinds = []
        for backend in (resident, headless):
            with pytest.raises(InferqError) as caught:
                swap(backend, source, target)
            assert caught.value.code == code
            kinds.append(type(caught.value))
        assert kinds[0] is kinds[1]
    assert facefusion(resident) == first


def test_the_models_stay_in_memory(
    home: Path, python: str, weights: Path, tmp_path: Path, swap: Callable[..., Any]
) -> None:
    models = tmp_path / "models"
    shutil.copytree(weights, models)
    backend = ResidentBackend(home=home, python=python, providers=["cpu"], models=models)
    try:
        for model in models.glob("*.onnx"):
            model.unlink()
        for face in ("largest", "all"):
            assert swap(backend, face=face)[80, 80, 2] > 150
    finally:
        backend.close()


def test_weights_that_are_missing_are_named_and_not_downloaded(
    home: Path, python: str, weights: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(weights, models)
    (models / "2dfan4.onnx").write_bytes(b"damaged")
    with pytest.raises(InstallationError, match="2dfan4"):
        ResidentBackend(home=home, python=python, providers=["cpu"], models=models)
    assert (models / "2dfan4.onnx").read_bytes() == b"damaged"


def test_a_model_that_cannot_be_loaded_ends_the_start(
    home: Path, python: str, weights: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(weights, models)
    (models / "2dfan4.onnx").write_bytes(b"")  # its fatal_exit
    (models / "2dfan4.hash").write_text("00000000")
    with pytest.raises(InstallationError, match="loading model 2dfan4 failed") as caught:
        ResidentBackend(home=home, python=python, providers=["cpu"], models=models)
    assert caught.value.code == "engine_not_loadable"


def test_a_content_filter_whose_source_is_changed_refuses_each_task(
    home: Path, resident: ResidentBackend, swap: Callable[..., Any]
) -> None:
    source = home / "facefusion" / "content_analyser.py"
    original = source.read_bytes()
    swap(resident)
    source.write_bytes(original + b"\ndef detect_nsfw(vision_frame):\n\treturn False\n")
    try:
        with pytest.raises(TransientFailure, match=r"content_analyser\.py") as caught:
            swap(resident, target=RED)
        assert caught.value.code == "engine_misconfigured"
        with pytest.raises(TransientFailure, match=r"content_analyser\.py"):
            swap(resident)
    finally:
        source.write_bytes(original)
    resident._replace()
    swap(resident)


def test_a_swap_that_is_to_stop_ends_within_a_second_and_facefusion_stays(
    resident: ResidentBackend, hang: Path, swap: Callable[..., Any]
) -> None:
    swap(resident)
    process = facefusion(resident)
    reached = hang.with_name("hang.reached")
    reached.unlink(missing_ok=True)
    hang.touch()
    asked: list[float] = []

    def abort() -> bool:
        if reached.exists():
            asked.append(time.monotonic())
        return bool(asked)

    try:
        with pytest.raises(TaskAborted):
            swap(resident, abort=abort)
    finally:
        hang.unlink()
    assert time.monotonic() - asked[0] < 1
    assert facefusion(resident) == process
    assert swap(resident)[80, 80, 2] > 150


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, "engine_error", "interrupted"),
        (signal.SIGTERM, "engine_died", "signal 15"),
        (signal.SIGKILL, "engine_died", "signal 9"),
    ],
)
def test_a_signal_fails_the_task_and_the_next_one_succeeds(
    resident: ResidentBackend, hang: Path, swap: Callable[..., Any], number: int, code: str, said: str
) -> None:
    swap(resident)
    process = facefusion(resident)
    reached = hang.with_name("hang.reached")
    reached.unlink(missing_ok=True)
    hang.touch()

    def interrupt() -> bool:
        if reached.exists() and process.is_running():
            hang.unlink(missing_ok=True)  # for the process that is started next
            process.send_signal(number)
        return False

    with pytest.raises(TransientFailure, match=said) as caught:
        swap(resident, abort=interrupt)
    assert caught.value.code == code
    assert not process.is_running()
    assert swap(resident)[80, 80, 2] > 150
