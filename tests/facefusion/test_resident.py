"""FaceFusion that stays loaded: our driver, with a stand-in for FaceFusion's functions, words and exits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest

from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.facefusion import FaceChoice
from inferq.consumers.facefusion.engine import FacefusionEngine
from inferq.consumers.facefusion.resident import ResidentBackend, judge_workflow
from inferq.consumers.media.decoder import Decoder
from inferq.schemas import InferqError, InstallationError, InvalidTask, TransientFailure
from tests.facefusion.conftest import COLLINS, HERE, HOPPER, Runner, pixels
from tests.waiting import eventually

GREY = np.full((40, 40, 3), 99, np.uint8)
RED = np.full((40, 40, 3), (255, 0, 0), np.uint8)


class StandIn:
    """The stand-in's folder: what it is to do, and what it noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(HERE / "standin", folder)
        self.does("swap")

    def does(self, behaviour: str) -> None:
        (self.folder / "behaviour").write_text(behaviour)

    def noted(self, key: str) -> list[dict[str, Any]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call for call in map(json.loads, lines) if key in call]

    def pids(self) -> list[int]:
        path = self.folder / "pids"
        eventually(path.exists, what="the stand-in's start")
        return [int(word) for word in path.read_text().split()]

    def backend(self, **changes: Any) -> ResidentBackend:
        given: dict[str, Any] = {"home": self.folder, "python": sys.executable, "providers": ["cpu"]}
        return ResidentBackend(**{**given, **changes})


@dataclass
class Swapper:
    """A loaded backend, and a new folder for each swap."""

    standin: StandIn
    backend: ResidentBackend
    folder: Path

    def __call__(
        self, target: Any = GREY, face: FaceChoice = "largest", abort: Callable[[], bool] = lambda: False
    ) -> np.ndarray[Any, Any]:
        self.context = Context(self.folder, {}, lambda *_: None, abort)
        self.folder = self.folder.with_name(self.folder.name + "-")
        return self.backend.swap(GREY, target, face, self.context).picture


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, ResidentBackend]]:
    standin = StandIn(tmp_path_factory.mktemp("home") / "facefusion home")
    backend = standin.backend()
    yield standin, backend
    backend.close()


@pytest.fixture
def swap(loaded: tuple[StandIn, ResidentBackend], tmp_path: Path) -> Swapper:
    """FaceFusion that many tests share, without notes of earlier ones."""
    standin, backend = loaded
    standin.does("swap")
    for name in ("calls.jsonl", "pids"):
        (standin.folder / name).unlink(missing_ok=True)
    return Swapper(standin, backend, tmp_path / "run")


@pytest.fixture
def own(tmp_path: Path) -> StandIn:
    """A stand-in that is not loaded yet."""
    return StandIn(tmp_path / "home")


@pytest.fixture
def use(own: StandIn, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FacefusionEngine]:
    """Makes engines with these settings. Their decoder is loaded."""

    def use(**settings: str) -> FacefusionEngine:
        given = {
            "backend": "facefusion",
            "home": str(own.folder),
            "python": sys.executable,
            "providers": "cpu",
        }
        for name, value in (given | settings).items():
            monkeypatch.setenv(f"INFERQ_FACEFUSION_{name.upper()}", value)
        engine = FacefusionEngine()
        engine._decoder = decoder
        return engine

    return use


def gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_one_process_swaps_for_all_tasks_and_keeps_its_models(own: StandIn, tmp_path: Path) -> None:
    backend = own.backend()
    assert (backend.info.name, backend.info.version, backend.info.device) == ("facefusion", "3.8.0", "cpu")
    backend.warm_up()
    swap = Swapper(own, backend, tmp_path / "run")
    first, second = swap(), swap()
    backend.close()
    assert (first[5:31, 5:31] == (1, 2, 3)).all()
    assert (first == second).all()
    assert len(own.noted("loaded")) == 1
    assert own.noted("ran")[0]["ran"] == [[1, 3, 4, 4]]
    assert len(own.noted("state")) == 2
    (process,) = {call["pid"] for call in own.noted("pid")}
    assert gone(process)


def test_a_model_that_cannot_be_warmed_up_does_not_keep_it_from_starting(
    own: StandIn, tmp_path: Path
) -> None:
    own.does("no warm-up")
    backend = own.backend()
    backend.warm_up()
    assert "RuntimeError: wrong shape" in backend._driver.lines
    own.does("swap")
    Swapper(own, backend, tmp_path / "run")()
    backend.close()


def test_each_task_has_arguments_of_its_own(swap: Swapper) -> None:
    for face in (2, "all", "largest"):
        swap(face=cast("FaceChoice", face))
        assert not list(swap.context.scratch.iterdir())
    states = [call["state"] for call in swap.standin.noted("state")]
    assert [state["face_selector_mode"] for state in states] == ["reference", "many", "one"]
    # Nothing of the first task is left for the second.
    assert [state["reference_face_position"] for state in states] == [2, 0, 0]
    assert [state["reference_face_distance"] for state in states] == [0.05, 0.3, 0.3]
    for state in states:
        assert state["video_memory_strategy"] == "tolerant"
        assert state["processors"] == ["face_swapper"]
        for path in (*state["source_paths"], state["target_path"], state["output_path"], state["temp_path"]):
            assert Path(path).is_relative_to(swap.context.folder.parent)
    assert len({state["output_path"] for state in states}) == 3
    assert states[0]["conda"]


def test_the_engine_keeps_it_loaded_by_default(
    own: StandIn, runner: Runner, use: Callable[..., FacefusionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_API_KEY", "secret")
    engine = use()
    engine.load()
    run = runner(engine, COLLINS, HOPPER)
    assert isinstance(engine._backend, ResidentBackend)
    engine._backend.close()
    assert run.output is not None
    assert not run.output.preview
    assert (run.output.source_faces, run.output.target_faces, run.output.swapped) == (None, None, None)
    expected = pixels(HOPPER)
    expected[5:31, 5:31] = (1, 2, 3)
    assert (run.picture == expected).all()
    fractions = [fraction for fraction, _ in run.reports]
    assert fractions == sorted(fractions)
    assert {(0.15, "checking the pictures"), (0.625, "swapping"), (1.0, "done")} <= set(run.reports)
    # FaceFusion gets none of our settings, which hold keys.
    (call,) = own.noted("environment")
    assert not [name for name in call["environment"] if name.startswith("INFERQ_")]


def test_no_verdict_of_an_earlier_picture_at_the_same_path_is_used(swap: Swapper) -> None:
    folder = swap.folder
    swap(GREY)
    swap.folder = folder
    with pytest.raises(InvalidTask, match=r"target_url.*content filter") as caught:
        swap(RED)
    assert caught.value.code == "content_refused"
    swap.folder = folder
    swap(GREY)
    assert [len(call["faces"]) for call in swap.standin.noted("faces")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("behaviour", "kind", "code", "said", "stays"),
    [
        ("gate", InvalidTask, "content_refused", "content filter", True),
        ("no source face", InvalidTask, "no_face_found", "source_url", True),
        ("untouched", InvalidTask, "no_face_found", "target_url", True),
        ("copy fails", TransientFailure, "engine_error", "error code 1.*Copying image failed", True),
        ("weights", TransientFailure, "engine_error", "inswapper_128_fp16 failed", True),
        ("garbage", TransientFailure, "engine_error", "a picture that cannot be read", True),
        ("crash", TransientFailure, "engine_error", "RuntimeError: a bug", False),
        ("out of memory", TransientFailure, "out_of_memory", "too little free memory", False),
        ("hard exit 0", TransientFailure, "engine_error", "without a picture", False),
        ("hard exit 1", TransientFailure, "engine_error", "status 1", False),
        ("hard exit 2", TransientFailure, "engine_misconfigured", "INFERQ_FACEFUSION_PROVIDERS", False),
        ("exit with words", TransientFailure, "engine_error", "the processor could not be loaded", False),
        ("fatal exit", TransientFailure, "engine_error", "inswapper_128_fp16 failed", False),
        ("killed", TransientFailure, "engine_died", "signal 9", False),
        ("interrupted", TransientFailure, "engine_error", "interrupted", False),
    ],
)
def test_a_failure_says_what_it_was_and_the_next_task_succeeds(
    swap: Swapper, behaviour: str, kind: type[InferqError], code: str, said: str, stays: bool
) -> None:
    swap()
    swap.standin.does(behaviour)
    with pytest.raises(kind, match=f"(?s){said}") as caught:
        swap()
    assert caught.value.code == code
    assert not list(swap.context.scratch.iterdir())
    swap.standin.does("swap")
    swap()
    processes = [call["pid"] for call in swap.standin.noted("state")]
    assert (processes[0] == processes[-1]) is stays
    assert all(gone(process) for process in processes if process != processes[-1])


def test_a_content_filter_that_changes_refuses_each_task(swap: Swapper) -> None:
    swap()
    swap.standin.does("filter changed")
    for _ in range(2):
        with pytest.raises(TransientFailure, match=r"content_analyser\.py") as caught:
            swap()
        assert caught.value.code == "engine_misconfigured"
    assert len(swap.standin.noted("state")) == 1


def test_any_output_is_read_logged_and_never_taken_for_an_answer(
    swap: Swapper, caplog: pytest.LogCaptureFixture
) -> None:
    swap.standin.does("chatter")
    with caplog.at_level(logging.INFO, "inferq.consumers.facefusion.resident"):
        swap()
    assert 'FaceFusion: {"ended": 3}' in caplog.messages
    assert "FaceFusion: [FACEFUSION.CORE] Finalizing image with a resolution of 512x600" in caplog.messages
    assert not [message for message in caplog.messages if "50%|" in message]
    caplog.clear()  # a failure shows them all


def test_a_swap_that_is_to_stop_ends_within_a_second_and_facefusion_stays(swap: Swapper) -> None:
    swap.standin.does("slow")
    asked: list[float] = []

    def abort() -> bool:
        if (swap.standin.folder / "pids").exists():
            asked.append(time.monotonic())
        return bool(asked)

    with pytest.raises(TaskAborted):
        swap(abort=abort)
    assert time.monotonic() - asked[0] < 1
    swap.standin.does("swap")
    swap()
    assert [call["pid"] for call in swap.standin.noted("state")] == swap.standin.pids() * 2


def test_a_swap_that_does_not_stop_is_killed_with_all_that_it_started(swap: Swapper) -> None:
    swap.standin.does("hang")
    with pytest.raises(TaskAborted):
        swap(abort=(swap.standin.folder / "pids").exists)
    assert all(gone(process) for process in swap.standin.pids())
    assert not list(swap.context.scratch.iterdir())
    swap.standin.does("swap")
    swap()


def test_a_task_that_is_to_stop_does_not_wait_for_the_models(swap: Swapper) -> None:
    swap.backend._replace()
    with pytest.raises(TaskAborted):
        swap(abort=lambda: True)
    swap()
    assert len(swap.standin.noted("loaded")) == 1


def test_facefusion_that_hangs_while_it_loads_is_replaced(
    swap: Swapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap.standin.does("hang in load")
    swap.backend._replace()
    first = swap.standin.pids()
    monkeypatch.setattr("inferq.consumers.facefusion.resident._LOAD_SECONDS", 0.0)
    swap.standin.does("swap")
    with pytest.raises(TaskAborted):
        swap(abort=lambda: True)
    assert all(gone(process) for process in first)
    swap()


def test_facefusion_that_ends_between_two_tasks_costs_no_task(swap: Swapper) -> None:
    swap()
    (process,) = {call["pid"] for call in swap.standin.noted("state")}
    os.kill(process, signal.SIGKILL)
    assert eventually(lambda: not swap.backend._driver.alive)
    swap()
    assert swap.standin.noted("state")[-1]["pid"] != process


def test_nothing_outlives_an_engine_that_is_killed(own: StandIn, tmp_path: Path) -> None:
    code = f"""
import numpy as np
from pathlib import Path
from inferq.consumers.engine import Context
from inferq.consumers.facefusion.resident import ResidentBackend
backend = ResidentBackend(home=Path({str(own.folder)!r}), python={sys.executable!r}, providers=["cpu"])
Path({str(own.folder / "behaviour")!r}).write_text("hang")
context = Context(Path({str(tmp_path / "run")!r}), {{}}, lambda *_: None, lambda: False)
picture = np.zeros((8, 8, 3), np.uint8)
backend.swap(picture, picture, "largest", context)
"""
    engine = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, process_group=0)
    try:
        facefusion, child = own.pids()
        engine.kill()
        assert eventually(lambda: gone(facefusion) and gone(child), what="the group's end")
    finally:
        engine.kill()
        engine.wait()


@pytest.mark.parametrize(
    ("behaviour", "kind", "code", "said"),
    [
        ("no ffmpeg", InstallationError, "engine_not_loadable", "curl and ffmpeg: install.*FFMpeg"),
        ("bad configuration", InstallationError, "engine_misconfigured", "facefusion.ini"),
        ("filter changed", InstallationError, "engine_misconfigured", "content_analyser.py"),
        ("no weights", TransientFailure, "weights_unavailable", "force-download.*inswapper_128_fp16"),
        (
            "cannot load",
            InstallationError,
            "engine_not_loadable",
            "face.onnx failed.*INFERQ_FACEFUSION_PYTHON",
        ),
        ("no memory to load", TransientFailure, "out_of_memory", "too little free memory"),
    ],
)
def test_a_start_that_fails_says_what_to_do(
    own: StandIn, behaviour: str, kind: type[InferqError], code: str, said: str
) -> None:
    own.does(behaviour)
    with pytest.raises(kind, match=f"(?s){said}") as caught:
        own.backend()
    assert type(caught.value) is kind
    assert caught.value.code == code


def test_a_provider_that_it_does_not_have_ends_the_start(own: StandIn) -> None:
    with pytest.raises(InstallationError, match=r"(?s)INFERQ_FACEFUSION_PROVIDERS.*tensorrt") as caught:
        own.backend(providers=["tensorrt"])
    assert caught.value.code == "engine_misconfigured"


def test_weights_of_another_folder_are_used_where_the_setting_names_it(
    own: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own.backend(models=Path("weights")).close()
    own.backend().close()
    assert [call["weights"] for call in own.noted("weights")] == [
        str(tmp_path / "weights" / "face.onnx"),
        str(own.folder / ".assets" / "models" / "face.onnx"),
    ]


def test_weights_come_verified_from_the_manifest(
    own: StandIn, tmp_path: Path, use: Callable[..., FacefusionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_WEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INFERQ_WEIGHTS_MANIFEST", str(tmp_path / "weights.toml"))
    (tmp_path / "face.onnx").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "weights.toml").write_text(
        f'[faces]\nversion = "1"\nsource = "{tmp_path.as_uri()}"\n'
        f'[faces.files."face.onnx"]\nsize = 7\nsha256 = "{sha256}"\n'
    )
    engine = use(model_dir="weights:faces")
    engine.load()
    engine._backend.close()
    (call,) = own.noted("weights")
    assert Path(call["weights"]).read_bytes() == b"weights"
    assert Path(call["weights"]).is_relative_to(tmp_path / "cache")
    (tmp_path / "cache" / "faces" / "1" / "face.onnx").write_bytes(b"Weights")
    (tmp_path / "face.onnx").write_bytes(b"WEIGHTS")
    with pytest.raises(InferqError, match="SHA-256"):
        use(model_dir="weights:faces").load()
    assert len(own.noted("weights")) == 1


def test_the_old_way_refuses_weights_of_another_folder(use: Callable[..., FacefusionEngine]) -> None:
    with pytest.raises(InstallationError, match="INFERQ_FACEFUSION_MODEL_DIR needs"):
        use(resident="false", model_dir="/weights").load()


@pytest.mark.parametrize(
    ("error", "has_output", "lines", "expected"),
    [
        (0, True, [], None),
        (0, True, ["no source face detected in one of two"], None),
        (0, False, [], "engine_error"),
        (1, False, ["Processing step 1 of 1"], "engine_error"),
        (1, True, ["Processing step 1 of 1"], "engine_error"),
        (2, False, ["Match the target and output extension!"], "engine_error"),
        (2, False, ["no source face detected!"], "no_face_found"),
        (3, False, [], "content_refused"),
        (3, True, ["Processing step 1 of 1"], "content_refused"),
        (1, False, ["CUDA out of memory"], "out_of_memory"),
    ],
)
def test_a_workflow_is_judged_by_its_error_code_and_its_words(
    error: int, has_output: bool, lines: list[str], expected: str | None
) -> None:
    failure = judge_workflow(error, has_output, lines)
    assert (failure and failure.code) == expected
