"""The preview on the sample portraits, the way a worker runs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.facefusion import FacefusionOutput
from inferq.consumers.facefusion.engine import FacefusionEngine, _not_installed, load_backend
from inferq.consumers.facefusion.landmarks import FaceFinder, mesh_edges
from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.consumers.facefusion.warp import triangulate, warp
from inferq.schemas import InstallationError, InvalidTask
from tests.facefusion.conftest import COLLINS, HOPPER, Pixels, Run, Runner, pixels

COLLINS_BOX = (179, 69, 273, 177)
HOPPER_BOX = (169, 131, 357, 333)


def output(run: Run) -> FacefusionOutput:
    assert run.output is not None
    return run.output


def targets(run: Run) -> list[tuple[int, int, int, int]]:
    return [face.box for face in output(run).target_faces or ()]


def changed(before: Pixels, after: Pixels) -> tuple[int, int, int, int]:
    """The box of the pixels that differ: left, top, right, bottom."""
    rows, columns = np.nonzero((before != after).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def close(box: tuple[int, ...], expected: tuple[int, ...], by: float) -> bool:
    return bool(np.abs(np.array(box) - np.array(expected)).max() <= by)


def part(picture: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    left, top, right, bottom = box
    return picture[top:bottom, left:right]


def resized(picture: Pixels, width: int, height: int) -> Pixels:
    shrinks = width < picture.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=how), np.uint8)


def likeness(finder: FaceFinder, picture: Pixels, other: Pixels) -> float:
    """How alike the eyes and noses of two pictures' faces are, from -1 to 1, in whatever shape and light."""
    face, reference = finder.find(picture)[0], finder.find(other)[0]
    height, width = other.shape[:2]
    shaped, _ = warp(picture, face.points, reference.points, triangulate(mesh_edges()), (width, height))
    inner = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(inner, cv2.convexHull(reference.points[[70, 300, 50, 280, 2], :2].astype(np.int32)), 1)
    size = reference.area**0.5
    fine = []
    for values in (shaped, other):
        grey = cv2.cvtColor(values, cv2.COLOR_RGB2GRAY).astype(np.float32)
        grey = cv2.GaussianBlur(grey, (0, 0), size / 60)
        fine.append((grey - cv2.GaussianBlur(grey, (0, 0), size / 6))[inner > 0])
    return float(np.corrcoef(*fine)[0, 1])


@pytest.mark.parametrize(
    ("source", "target", "box"),
    [(COLLINS, HOPPER, HOPPER_BOX), (HOPPER, COLLINS, COLLINS_BOX)],
    ids=["onto Hopper", "onto Collins"],
)
def test_the_sources_face_stands_on_the_target_in_the_targets_light(
    preview: FacefusionEngine,
    runner: Runner,
    source: Path,
    target: Path,
    box: tuple[int, int, int, int],
) -> None:
    run = runner(preview, source, target)
    before, after = pixels(target), run.picture
    assert output(run).preview
    assert output(run).swapped == (0,)
    assert close(targets(run)[0], box, 4)
    assert 0.5 < (output(run).target_faces or ())[0].score <= 1
    assert (output(run).width, output(run).height) == (after.shape[1], after.shape[0])
    # Its features are the source's now, and no longer the target's.
    finder = preview._backend._finder  # type: ignore[attr-defined]
    assert likeness(finder, after, pixels(source)) > 0.8 > likeness(finder, before, pixels(source)) + 0.1
    # Nothing is burnt out, nothing grey: each patch is about as bright and as coloured as it was.
    lab = [
        cv2.cvtColor(part(picture, box), cv2.COLOR_RGB2LAB).astype(np.float32) for picture in (before, after)
    ]
    patches = [cv2.resize(values, (4, 4), interpolation=cv2.INTER_AREA) for values in lab]
    assert np.abs(patches[0] - patches[1])[:, :, 0].max() < 40
    assert np.abs(patches[0] - patches[1])[:, :, 1:].max() < 12
    assert np.percentile(lab[1][:, :, 0], 99) <= np.percentile(lab[0][:, :, 0], 99) + 3
    assert (part(after, box).min(axis=2) >= 250).mean() < 0.005
    # Beyond the face the picture is what it was, to the pixel.
    left, top, right, bottom = changed(before, after)
    assert left >= box[0] - 5
    assert top >= box[1] - 5
    assert right <= box[2] + 5
    assert bottom <= box[3] + 5


def test_the_seam_is_not_seen(preview: FacefusionEngine, runner: Runner) -> None:
    """Where the face fades out, the picture changes by little from one pixel to the next."""
    before = pixels(HOPPER).astype(np.int32)
    change = np.abs(runner(preview, COLLINS, HOPPER).picture.astype(np.int32) - before).sum(axis=2)
    outermost = cv2.dilate((change == 0).astype(np.uint8), np.ones((7, 7), np.uint8)) * (change > 0)
    assert outermost.sum() > 300
    assert np.percentile(change[outermost > 0], 95) < 40


def side_by_side() -> Pixels:
    return np.hstack([pixels(COLLINS), pixels(HOPPER)[:512]])


def test_of_two_faces_the_largest_is_replaced(preview: FacefusionEngine, runner: Runner) -> None:
    both = side_by_side()
    run = runner(preview, COLLINS, both)
    assert close(targets(run)[0], (512 + 169, 131, 512 + 357, 333), 6)
    assert close(targets(run)[1], COLLINS_BOX, 6)
    assert output(run).swapped == (0,)
    assert changed(both, run.picture)[0] > 600


@pytest.mark.parametrize(("face", "swapped"), [(0, (0,)), (1, (1,)), ("all", (0, 1))])
def test_one_of_two_faces_or_both_are_replaced(
    preview: FacefusionEngine,
    runner: Runner,
    face: int | Literal["all"],
    swapped: tuple[int, ...],
) -> None:
    both = side_by_side()
    run = runner(preview, HOPPER, both, face=face)
    assert output(run).swapped == swapped
    touched = (both != run.picture).any(axis=2)
    assert touched[:, :512].any() == (1 in swapped)
    assert touched[:, 512:].any() == (0 in swapped)


def test_of_several_faces_on_the_source_the_largest_is_used(
    preview: FacefusionEngine, runner: Runner
) -> None:
    run = runner(preview, side_by_side(), COLLINS)
    assert len(output(run).source_faces or ()) == 2
    alone = runner(preview, HOPPER, COLLINS)
    assert np.abs(run.picture.astype(int) - alone.picture.astype(int)).mean() < 1


def test_a_number_beyond_the_last_face_is_refused(preview: FacefusionEngine, runner: Runner) -> None:
    with pytest.raises(InvalidTask, match=r"target_url.*2 faces.*no face 2.*options\.face") as caught:
        runner(preview, COLLINS, side_by_side(), face=2)
    assert caught.value.code == "no_face_found"


def without_a_face() -> Pixels:
    return np.ascontiguousarray(pixels(COLLINS)[250:])


def test_a_picture_without_a_face_is_refused_by_its_name(preview: FacefusionEngine, runner: Runner) -> None:
    for source, target, named in [(without_a_face(), HOPPER, "source"), (HOPPER, without_a_face(), "target")]:
        with pytest.raises(InvalidTask, match=f"{named}_url: no face was found on the {named}") as caught:
            runner(preview, source, target)
        assert caught.value.code == "no_face_found"
        assert runner.runs[-1].context.artifacts == []


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_face_that_lies_or_stands_on_its_head_is_replaced_as_well(
    preview: FacefusionEngine, runner: Runner, quarters: int
) -> None:
    turned = np.ascontiguousarray(np.rot90(pixels(HOPPER), quarters))
    run = runner(preview, COLLINS, turned)
    upright = np.rot90(run.picture, -quarters)
    expected = runner(preview, COLLINS, HOPPER).picture
    face = (slice(150, 320), slice(190, 340))
    assert np.abs(upright[face].astype(int) - expected[face].astype(int)).mean() < 8


@pytest.mark.parametrize("degrees", [-60, -30, 30, 45])
def test_a_leaning_face_is_replaced_as_well(preview: FacefusionEngine, runner: Runner, degrees: int) -> None:
    height, width = pixels(HOPPER).shape[:2]
    transform = cv2.getRotationMatrix2D((262, 240), degrees, 1)
    leaning = cv2.warpAffine(pixels(HOPPER), transform, (width, height), borderMode=cv2.BORDER_REPLICATE)
    run = runner(preview, COLLINS, np.asarray(leaning, np.uint8))
    straight = cv2.warpAffine(run.picture, cv2.invertAffineTransform(transform), (width, height))
    expected = runner(preview, COLLINS, HOPPER).picture
    face = (slice(150, 320), slice(190, 340))
    assert np.abs(straight[face].astype(int) - expected[face].astype(int)).mean() < 12


@pytest.mark.parametrize("portrait", [COLLINS, HOPPER], ids=["Collins", "Hopper"])
@pytest.mark.parametrize("wide", [40, 60])
@pytest.mark.parametrize("canvas", [None, (1024, 768)], ids=["alone", "in a large picture"])
def test_faces_from_40_pixels_on_are_replaced(
    preview: FacefusionEngine, runner: Runner, portrait: Path, wide: int, canvas: tuple[int, int] | None
) -> None:
    left, _, right, _ = COLLINS_BOX if portrait == COLLINS else HOPPER_BOX
    factor = wide / (right - left)
    picture = pixels(portrait)
    small = resized(picture, round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    if canvas:
        width, height = canvas
        around = np.full((height, width, 3), (90, 110, 130), np.uint8)
        around[height - small.shape[0] :, width - small.shape[1] :] = small
        small = around
    run = runner(preview, HOPPER if portrait == COLLINS else COLLINS, small)
    (box,) = targets(run)
    assert box[2] - box[0] == pytest.approx(wide, abs=4)
    assert (run.picture != small).any(axis=2).sum() > 0.3 * wide * wide


def test_a_face_cut_off_by_the_edge_does_no_harm(preview: FacefusionEngine, runner: Runner) -> None:
    cut = np.ascontiguousarray(pixels(HOPPER)[:, 200:])
    run = runner(preview, COLLINS, cut)
    (box,) = targets(run)
    assert box[0] == 0
    assert run.picture.shape == cut.shape
    assert (run.picture != cut).any()


def test_a_small_target_is_quick_and_a_large_one_costs_little_more(preview: FacefusionEngine) -> None:
    """Beyond decoding and encoding. CPU time: other processes do not count."""
    backend = preview._backend
    source = pixels(COLLINS)

    def seconds(width: int, height: int) -> float:
        target = resized(pixels(HOPPER), width, height)
        spent = []
        for _ in range(3):
            context = Context(Path("/nonexistent"), {}, lambda *_: None, lambda: False)
            begun = time.process_time()
            backend.swap(source, target.copy(), "largest", context)
            spent.append(time.process_time() - begun)
        return min(spent)

    assert seconds(512, 600) < 0.15
    small, large = seconds(1000, 750), seconds(4000, 3000)
    assert large < 4 * small, (small, large)  # 16 times the pixels, the face's included


def test_nothing_is_different_the_second_time(preview: FacefusionEngine, runner: Runner) -> None:
    first = runner(preview, COLLINS, side_by_side(), face="all")
    runner(preview, HOPPER, COLLINS)
    second = runner(preview, COLLINS, side_by_side(), face="all")
    assert output(first) == output(second)
    assert first.context.artifacts[0].path.read_bytes() == second.context.artifacts[0].path.read_bytes()


def test_runs_leave_no_files_behind(preview: FacefusionEngine, runner: Runner) -> None:
    inputs = runner.file(pixels(COLLINS)), runner.file(pixels(HOPPER))
    opened = psutil.Process().num_fds()
    for _ in range(5):  # that memory does not grow either, the contract's own check sees
        run = runner(preview, *inputs)
        assert [path.name for path in run.context.folder.rglob("*") if path.is_file()] == ["output.png"]
    assert psutil.Process().num_fds() == opened


def test_progress_runs_forward(preview: FacefusionEngine, runner: Runner) -> None:
    run = runner(preview, COLLINS, side_by_side(), face="all")
    fractions = [fraction for fraction, _ in run.reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert [note for _, note in run.reports if note.startswith("face ")] == ["face 1 of 2", "face 2 of 2"]


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_a_run_stops_wherever_it_is_asked_to(preview: FacefusionEngine, runner: Runner, after: int) -> None:
    asked = 0

    def abort() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(TaskAborted):
        runner(preview, COLLINS, side_by_side(), abort, face="all")
    assert asked == after + 1
    assert runner.runs[-1].context.artifacts == []


@pytest.mark.parametrize(
    ("chosen", "name", "kind"),
    [
        ("png", "output.png", "image/png"),
        ("jpeg", "output.jpg", "image/jpeg"),
        ("webp", "output.webp", "image/webp"),
    ],
)
def test_the_picture_is_of_the_kind_asked_for(
    preview: FacefusionEngine, runner: Runner, chosen: str, name: str, kind: str
) -> None:
    run = runner(preview, COLLINS, HOPPER, format=chosen)
    (artifact,) = run.context.artifacts
    assert (artifact.name, artifact.content_type, output(run).image) == (name, kind, name)
    with Image.open(artifact.path) as made:
        assert made.format == chosen.upper()
        assert made.size == (512, 600)
    if chosen != "png":
        coarse = runner(preview, COLLINS, HOPPER, format=chosen, quality=20)
        assert coarse.context.artifacts[0].path.stat().st_size < artifact.path.stat().st_size / 2


def test_the_engine_says_what_it_is() -> None:
    engine = FacefusionEngine()
    info = engine.load()
    assert (info.name, info.version, info.device) == ("preview", "0.10.21", "cpu")
    engine.close()
    with pytest.raises(RuntimeError, match=r"call load\(\) first"):
        engine.warm_up()


def test_without_mediapipe_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(InstallationError, match=r"mediapipe.*inferq\[facefusion\]") as caught:
        FacefusionEngine().load()
    assert caught.value.code == "engine_not_installed"


def test_another_version_of_mediapipe_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", SimpleNamespace(__version__="0.10.30"))
    with pytest.raises(InstallationError, match=r"mediapipe 0\.10\.30 .*mediapipe==0\.10\.21"):
        FacefusionEngine().load()


def test_an_opencv_that_needs_a_display_is_told_from_one_that_is_missing() -> None:
    display = ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
    assert "opencv-python-headless" in _not_installed(display).message
    assert "opencv-python-headless" not in _not_installed(ImportError("No module named 'cv2'")).message


@pytest.mark.parametrize(
    ("name", "value"),
    [("INFERQ_FACEFUSION_BACKEND", "deepfake"), ("INFERQ_FACEFUSION_PROVIDERS", "cuda;rm"),
     ("INFERQ_FACEFUSION_MAX_PIXELS", "0")],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InstallationError, match=name):
        FacefusionEngine()


def test_a_gpu_that_the_preview_cannot_use_is_refused() -> None:
    with pytest.raises(InstallationError, match="set INFERQ_FACEFUSION_BACKEND=facefusion") as refused:
        load_backend(FacefusionSettings(device="cuda"))
    assert refused.value.code == "device_unavailable"
