"""FaceFusion as a subprocess, played by a stand-in with its arguments, exit statuses and words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from inferq.consumers.engine import TaskAborted
from inferq.consumers.facefusion.engine import FacefusionEngine
from inferq.consumers.facefusion.headless import HeadlessBackend, judge, read_progress, swapped_picture
from inferq.consumers.media.decoder import Decoder
from inferq.schemas import InstallationError, InvalidTask, TransientFailure
from tests.facefusion.conftest import COLLINS, HOPPER, Runner, pixels
from tests.waiting import eventually

MakeEngine = Callable[[str], FacefusionEngine]


@pytest.fixture
def make_engine(home: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """An engine on the stand-in, whose faults a test chooses; it needs no GPU."""
    monkeypatch.setattr("inferq.consumers.facefusion.engine.gpu_fault", lambda number: None)
    monkeypatch.setenv("INFERQ_FACEFUSION_BACKEND", "facefusion")
    monkeypatch.setenv("INFERQ_FACEFUSION_RESIDENT", "false")
    monkeypatch.setenv("INFERQ_FACEFUSION_HOME", str(home))
    monkeypatch.setenv("INFERQ_FACEFUSION_PYTHON", sys.executable)

    def make(behaviour: str) -> FacefusionEngine:
        engine = FacefusionEngine()
        engine._decoder = decoder
        engine.load()
        (home / "behaviour").write_text(behaviour)
        return engine

    return make


def calls(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "calls.jsonl").read_text().splitlines()]


def test_what_facefusion_made_is_the_artifact(make_engine: MakeEngine, home: Path, runner: Runner) -> None:
    engine = make_engine("swap")
    info = engine.load()
    assert (info.name, info.version, info.device) == ("facefusion", "3.8.0", "cuda")
    engine.warm_up()
    run = runner(engine, COLLINS, HOPPER, format="png")
    assert run.output is not None
    assert not run.output.preview
    assert (run.output.width, run.output.height) == (512, 600)
    assert (run.output.source_faces, run.output.target_faces, run.output.swapped) == (None, None, None)
    expected = pixels(HOPPER)
    expected[5:31, 5:31] = (1, 2, 3)
    assert (run.picture == expected).all()
    assert [path.name for path in run.context.scratch.rglob("*") if path.is_file()] == ["output.png"]
    fractions = [fraction for fraction, _ in run.reports]
    assert fractions == sorted(fractions)
    assert {(0.4, "swapping"), (0.625, "swapping"), (0.85, "swapping"), (1.0, "done")} <= set(run.reports)
    engine.close()


def test_each_run_has_jobs_and_temporary_files_of_its_own_and_none_of_our_secrets(
    make_engine: MakeEngine, home: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_API_KEY", "secret")
    engine = make_engine("swap")
    for _ in range(2):
        runner(engine, COLLINS, HOPPER)
    assert len(calls(home)) == 2
    for call, run in zip(calls(home), runner.runs, strict=True):
        argv = call["argv"]
        for option in ("--jobs-path", "--temp-path", "-s", "-t", "-o"):
            assert Path(argv[argv.index(option) + 1]).is_relative_to(run.context.folder), option
        assert Path(call["env"]["TMPDIR"]).is_relative_to(run.context.folder)
        assert call["cwd"] == str(home)
        assert not [name for name in call["env"] if name.startswith("INFERQ_")]
        assert argv[argv.index("--processors") + 1] == "face_swapper"
        assert not [word for word in argv if "nsfw" in word.lower() or "content" in word.lower()]


@pytest.mark.parametrize(
    ("face", "chosen"),
    [
        ("largest", ["--face-selector-mode", "one"]),
        ("all", ["--face-selector-mode", "many"]),
        (2, ["--face-selector-mode", "reference", "--reference-face-position", "2"]),
    ],
)
def test_the_faces_are_chosen_as_the_task_says(
    make_engine: MakeEngine, home: Path, runner: Runner, face: str | int, chosen: list[str]
) -> None:
    runner(make_engine("swap"), COLLINS, HOPPER, face=face)
    argv = calls(home)[0]["argv"]
    start = argv.index("--face-selector-mode")
    assert argv[start : start + len(chosen)] == chosen
    assert argv[argv.index("--face-selector-order") + 1] == "large-small"


@pytest.mark.parametrize(
    ("behaviour", "kind", "code", "said"),
    [
        ("gate", InvalidTask, "content_refused", "content filter"),
        ("no source face", InvalidTask, "no_face_found", "source_url"),
        ("untouched", InvalidTask, "no_face_found", "target_url"),
        ("crash", TransientFailure, "engine_error", "RuntimeError: a bug"),
        ("weights", TransientFailure, "engine_error", "inswapper_128_fp16 failed"),
        ("out of memory", TransientFailure, "out_of_memory", "memory"),
        ("killed", TransientFailure, "engine_died", "signal 9"),
        ("garbage", TransientFailure, "engine_error", "a picture that cannot be read"),
        ("broken", TransientFailure, "engine_misconfigured", "FFMpeg is not installed"),
    ],
)
def test_a_failure_says_what_it_was(
    make_engine: MakeEngine,
    runner: Runner,
    behaviour: str,
    kind: type[InvalidTask | TransientFailure],
    code: str,
    said: str,
) -> None:
    engine = make_engine(behaviour)
    run = runner.prepare(COLLINS, HOPPER)
    with pytest.raises(kind) as caught:
        runner(engine, COLLINS, HOPPER)
    assert caught.value.code == code
    assert said in caught.value.message
    assert run.context.artifacts == []
    assert not [path for path in runner.runs[-1].context.scratch.rglob("*") if path.is_file()]


def test_a_provider_that_it_does_not_have_is_named(
    make_engine: MakeEngine, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_FACEFUSION_PROVIDERS", "tensorrt,cuda")
    with pytest.raises(TransientFailure, match=r"INFERQ_FACEFUSION_PROVIDERS.*tensorrt") as caught:
        runner(make_engine("swap"), COLLINS, HOPPER)
    assert caught.value.code == "engine_misconfigured"


def test_any_amount_of_output_is_read(make_engine: MakeEngine, runner: Runner) -> None:
    assert runner(make_engine("chatter"), COLLINS, HOPPER).output is not None


def pids(home: Path) -> list[int]:
    """The processes of a run that hangs: FaceFusion, and one that it started."""
    path = home / "pids"
    eventually(path.exists, what="the stand-in's start")
    return [int(word) for word in path.read_text().split()]


def gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_run_that_is_to_stop_ends_with_all_that_it_started(
    make_engine: MakeEngine, home: Path, runner: Runner
) -> None:
    engine = make_engine("hang")
    with pytest.raises(TaskAborted):
        runner(engine, COLLINS, HOPPER, abort=(home / "pids").exists)
    # Not after a while: nothing of it runs once the engine has said that it stopped.
    assert all(gone(process) for process in pids(home))
    assert not list(runner.runs[-1].context.scratch.iterdir())


def test_an_interrupted_run_is_worth_another_attempt(
    make_engine: MakeEngine, home: Path, runner: Runner
) -> None:
    engine = make_engine("hang")
    interrupter = threading.Thread(target=lambda: os.kill(pids(home)[0], signal.SIGINT))
    interrupter.start()
    with pytest.raises(TransientFailure, match="interrupted"):
        runner(engine, COLLINS, HOPPER)
    interrupter.join()
    assert eventually(lambda: all(gone(process) for process in pids(home)))


@pytest.mark.parametrize("victim", ["engine", "engine's group", "warden"])
def test_nothing_outlives_an_engine_that_is_killed(home: Path, tmp_path: Path, victim: str) -> None:
    (home / "behaviour").write_text("swap")
    code = f"""
import numpy as np
from pathlib import Path
from inferq.consumers.engine import Context
from inferq.consumers.facefusion.headless import HeadlessBackend
backend = HeadlessBackend(home=Path({str(home)!r}), python={sys.executable!r}, providers=["cpu"])
Path({str(home / "behaviour")!r}).write_text("hang")
context = Context(Path({str(tmp_path / "run")!r}), {{}}, lambda *_: None, lambda: False)
picture = np.zeros((8, 8, 3), np.uint8)
backend.swap(picture, picture, "largest", context)
"""
    engine = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, process_group=0)
    try:
        facefusion, child = pids(home)
        if victim != "warden":
            end = engine.kill if victim == "engine" else partial(os.killpg, engine.pid, signal.SIGKILL)
            end()
            assert eventually(lambda: gone(facefusion) and gone(child), what="the group's end")
        else:
            psutil.Process(facefusion).parent().kill()  # type: ignore[union-attr]
            assert eventually(lambda: gone(facefusion), what="its end")
            psutil.Process(child).kill()
    finally:
        engine.kill()
        engine.wait()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"home": None}, "INFERQ_FACEFUSION_HOME is not set"),
        ({"home": Path("/nonexistent/facefusion")}, "is not a folder"),
        ({"home": Path(__file__).parent}, "no facefusion.py"),
        ({"python": "/nonexistent/python"}, "INFERQ_FACEFUSION_PYTHON"),
        ({"python": "false"}, "does not start"),
    ],
)
def test_an_installation_that_cannot_work_says_what_to_do(
    home: Path, change: dict[str, Any], said: str
) -> None:
    given: dict[str, Any] = {"home": home, "python": sys.executable, "providers": ["cpu"], **change}
    with pytest.raises(InstallationError, match=said):
        HeadlessBackend(**given)


def test_what_facefusion_itself_misses_is_passed_on(home: Path) -> None:
    (home / "behaviour").write_text("broken")
    with pytest.raises(InstallationError, match=r"FFMpeg is not installed.*INFERQ_FACEFUSION_PYTHON"):
        HeadlessBackend(home=home, python=sys.executable, providers=["cpu"])


def test_its_own_environment_is_found(home: Path) -> None:
    python = home / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    backend = HeadlessBackend(home=home, python=None, providers=["cpu"])
    assert backend._command(home, "all")[0] == str(python)


@pytest.mark.parametrize(
    ("code", "has_output", "lines", "expected"),
    [
        (0, True, ["[FACEFUSION.CORE] Processing to image succeed in 1 seconds"], None),
        (0, True, ["no source face detected in one of two"], None),
        (0, False, [], "engine_error"),
        (1, False, [], "engine_error"),
        (1, False, ["[FACEFUSION.CORE] Processing step 1 of 1"], "content_refused"),
        (1, True, ["[FACEFUSION.CORE] Processing step 1 of 1"], "content_refused"),
        (1, False, ["Processing step 1 of 1", "Copying image failed"], "engine_error"),
        (2, False, ["usage: facefusion.py"], "engine_misconfigured"),
        (3, False, [], "engine_error"),
        (137, False, ["Processing step 1 of 1"], "engine_died"),
        (139, True, ["Processing step 1 of 1"], "engine_died"),
    ],
)
def test_a_run_is_judged_by_its_status_its_output_and_its_words(
    code: int, has_output: bool, lines: list[str], expected: str | None
) -> None:
    failure = judge(code, has_output, lines)
    assert (failure and failure.code) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[FACEFUSION.CORE] Processing step 1 of 1", (0.15, "checking the pictures")),
        ("downloading:  50%|=====     | 10.0M/20.0M", (0.1, "downloading weights")),
        ("processing: 100%|==========| 1/1", (0.85, "swapping")),
        ("[FACEFUSION.PROCESSORS.FACE_SWAPPER] Processing", (0.4, "swapping")),
        ("processing: 900%|", (0.85, "swapping")),
        ("something else", None),
    ],
)
def test_progress_is_read_from_the_output(line: str, expected: tuple[float, str] | None) -> None:
    found = read_progress(line)
    assert (found and (round(found[0], 6), found[1])) == expected


def test_an_output_of_another_size_is_taken_as_it_is(home: Path, runner: Runner) -> None:
    runner.file(np.zeros((50, 40, 3), np.uint8)).rename(home / "output.png")
    assert swapped_picture(home, np.zeros((25, 20, 3), np.uint8)).shape == (50, 40, 3)
