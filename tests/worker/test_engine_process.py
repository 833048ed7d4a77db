"""The engine process computes the task that it is given, whichever was announced before."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferq.consumers.runtime import child
from inferq.consumers.runtime.channel import Channel
from inferq.consumers.runtime.memory import MemoryLimits
from inferq.consumers.runtime.messages import Done, Failed, LoadFailed
from inferq.consumers.runtime.process import (
    AbortReason,
    EngineDied,
    EngineProcess,
    OverTime,
    RunAborted,
    RunHooks,
)
from inferq.producer.up import orphan_reaper
from inferq.schemas import InstallationError, TransientFailure, get_type, parse_task
from tests.waiting import eventually
from tests.worker.conftest import PLUGIN

UNWATCHED = RunHooks(lambda *_: None, lambda: None)


@pytest.fixture(scope="module", params=[-1.0, math.inf], ids=["idle", "awake"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    """An engine process that is always taken for idle, or never."""
    engine = EngineProcess("echo", idle_seconds=request.param)
    engine.spawn()
    engine.wait_ready(limit=60)
    yield engine
    engine.close()


def echo(payload: str) -> str:
    return parse_task({"task_id": payload, "task_type": "echo", "payload": payload}).body().decode()


def computed(engine: EngineProcess, task: str, scratch: Path) -> str:
    answer = engine.run(task, str(scratch), {}, watch=UNWATCHED, time_limit=20, abort_grace=1)
    assert isinstance(answer, Done)
    assert answer.output is not None
    payload = json.loads(answer.output)["payload"]
    assert isinstance(payload, str)
    return payload


def test_an_engine_without_its_packages_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[LoadFailed] = []
    monkeypatch.setattr(child, "send", lambda _pipe, answer: sent.append(answer))
    with socket.socket() as unused:
        child._serve(replace(get_type("echo"), engine="no_such_package.engine:Engine"), Channel(unused))
    assert [(answer.code, answer.permanent) for answer in sent] == [("engine_not_installed", True)]


@pytest.mark.parametrize("announced", [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["b", "b"]])
def test_it_computes_the_task_it_is_given(
    engine: EngineProcess, tmp_path: Path, announced: list[str]
) -> None:
    computed(engine, echo("before"), tmp_path)
    for payload in announced:
        engine.prepare(echo(payload))
    assert computed(engine, echo("b"), tmp_path) == "b"


def test_a_run_again_after_another_is_the_tasks_own(engine: EngineProcess, tmp_path: Path) -> None:
    engine.prepare(echo("a"))
    assert computed(engine, echo("b"), tmp_path) == "b"
    assert computed(engine, echo("a"), tmp_path) == "a"


StartFaulty = Callable[..., EngineProcess]


@pytest.fixture
def start_faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartFaulty]:
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN), prepend=os.pathsep)
    started: list[EngineProcess] = []

    def start(kill_at: int | None = None) -> EngineProcess:
        engine = EngineProcess("faulty", MemoryLimits(kill_at))
        started.append(engine)
        engine.spawn()
        return engine

    yield start
    for engine in started:
        engine.kill()


def run_faulty(
    engine: EngineProcess,
    folder: Path,
    fault: str,
    *,
    watch: RunHooks = UNWATCHED,
    time_limit: float = 20,
    abort_grace: float = 1,
    **options: Any,
) -> Done | Failed:
    task = {"task_id": "t", "task_type": "faulty", "fault": fault, "options": options}
    scratch = str(folder / "scratch")
    return engine.run(
        json.dumps(task), scratch, {}, watch=watch, time_limit=time_limit, abort_grace=abort_grace
    )


def test_an_engine_may_quote_what_is_no_proper_text(
    start_faulty: StartFaulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_faulty()
    engine.wait_ready(limit=60)
    notes: list[str] = []
    watch = RunHooks(lambda _, note: notes.append(note), lambda: None)
    answer = run_faulty(engine, tmp_path, "illegible", watch=watch)
    assert isinstance(answer, Failed)
    assert (answer.code, answer.message, answer.invalid) == ("illegible", "caf? is no word", True)
    assert notes == ["reads caf?"]
    assert engine.alive
    switch = tmp_path / "load"
    switch.write_text("illegible")
    monkeypatch.setenv("FAULTY_LOAD", str(switch))
    with pytest.raises(InstallationError, match=r"/models/caf\?"):
        start_faulty().wait_ready(limit=60)


@pytest.mark.parametrize(("reason", "expected"), [(None, OverTime), ("cancelled", RunAborted)])
def test_a_run_that_ends_beyond_its_limit_does_not_count_and_its_engine_stays(
    start_faulty: StartFaulty, tmp_path: Path, reason: AbortReason | None, expected: type[Exception]
) -> None:
    engine = start_faulty()
    engine.wait_ready(limit=60)
    watch = RunHooks(lambda *_: None, lambda: reason)
    with pytest.raises(expected):  # it takes two seconds, and does not ask whether to stop
        run_faulty(engine, tmp_path, "progress", watch=watch, time_limit=1, abort_grace=30)
    assert engine.usable
    assert isinstance(run_faulty(engine, tmp_path, "none"), Done)


def all_gone(helpers: Path) -> bool:
    return not any(orphan_reaper.alive(int(pid)) for pid in helpers.read_text().split())


@pytest.mark.parametrize(
    ("fault", "time_limit", "code"),
    [
        ("cut_and_die", 20, "engine_died"),
        ("cut_and_stay", 1, "time_limit"),
        ("endless_message", 1, "engine_died"),
    ],
)
def test_a_message_that_does_not_end_suspends_nothing(
    start_faulty: StartFaulty, tmp_path: Path, fault: str, time_limit: float, code: str
) -> None:
    engine = start_faulty()
    engine.wait_ready(limit=60)
    began = time.monotonic()
    with pytest.raises(TransientFailure) as raised:
        run_faulty(engine, tmp_path, fault, time_limit=time_limit, abort_grace=0.5)
    assert raised.value.code == code
    assert time.monotonic() - began < 15
    assert (engine.alive, engine.overdue, engine.run_seconds) == (False, 0, None)


def test_a_daemon_that_the_engine_started_ends_with_it(start_faulty: StartFaulty, tmp_path: Path) -> None:
    engine = start_faulty()
    engine.wait_ready(limit=60)
    daemon = tmp_path / "daemon"
    with pytest.raises(OverTime):
        run_faulty(engine, tmp_path, "hang_hard", time_limit=1, abort_grace=0.1, daemon=str(daemon))
    eventually(lambda: all_gone(daemon), what="its end")


def test_a_run_that_its_own_thread_does_not_end_is_overdue_and_ends_from_another(
    start_faulty: StartFaulty, tmp_path: Path
) -> None:
    engine = start_faulty()
    engine.wait_ready(limit=60)
    stuck = threading.Event()

    def look() -> None:
        stuck.wait(60)  # a service that does not answer

    watch = RunHooks(lambda *_: None, look)
    with ThreadPoolExecutor() as pool:
        run = pool.submit(
            run_faulty, engine, tmp_path, "hang_hard", watch=watch, time_limit=0.6, abort_grace=0
        )
        eventually(lambda: engine.overdue)
        assert engine.run_seconds
        engine.kill_overdue()
        eventually(lambda: not engine.alive)
        stuck.set()
        with pytest.raises(TransientFailure):
            run.result(60)
    assert not engine.overdue


@pytest.mark.parametrize(
    ("fault", "time_limit", "code"),
    [("crash", 20, "engine_died"), ("hang_hard", 1, "time_limit"), ("swell", 20, "out_of_memory")],
)
def test_what_the_engine_started_ends_with_it_and_does_not_hide_its_death(
    start_faulty: StartFaulty, tmp_path: Path, fault: str, time_limit: float, code: str
) -> None:
    engine = start_faulty(kill_at=400_000_000)
    engine.wait_ready(limit=60)
    helpers = tmp_path / "helpers"
    with pytest.raises(TransientFailure) as raised:
        run_faulty(engine, tmp_path, fault, time_limit=time_limit, helpers=str(helpers), megabytes=2000)
    assert (raised.value.code, isinstance(raised.value, EngineDied)) == (code, code == "engine_died")
    assert not engine.usable
    eventually(lambda: all_gone(helpers), what="their end")


def test_what_the_engine_started_ends_with_it_when_it_is_closed_or_dies_idle(
    start_faulty: StartFaulty, tmp_path: Path
) -> None:
    for name, end in (("closed", EngineProcess.close), ("idle", EngineProcess.kill)):
        engine = start_faulty()
        engine.wait_ready(limit=60)
        helpers = tmp_path / name
        run_faulty(engine, tmp_path, "none", helpers=str(helpers))
        if name == "idle":
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            eventually(lambda engine=engine: not engine.alive)
        end(engine)
        eventually(lambda helpers=helpers: all_gone(helpers), what=f"their end, {name}")


def test_a_program_that_the_engine_starts_does_not_hold_its_pipe(
    start_faulty: StartFaulty, tmp_path: Path
) -> None:
    engine = start_faulty()
    engine.wait_ready(limit=60)
    helpers = tmp_path / "helpers"
    run_faulty(engine, tmp_path, "none", helpers=str(helpers))
    for pid, sockets in zip(helpers.read_text().split(), (1, 0), strict=True):
        held = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # the program that starts up has closed it meanwhile
                held.append(str(entry.readlink()))
        assert sum(name.startswith("socket:") for name in held) == sockets


def test_an_engine_that_dies_while_loading_is_missed_though_a_fork_of_it_lives(
    start_faulty: StartFaulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = tmp_path / "load"
    switch.write_text("fork_and_die")
    monkeypatch.setenv("FAULTY_LOAD", str(switch))
    engine = start_faulty()
    eventually(lambda: engine.has_answered)
    with pytest.raises(TransientFailure, match="ended while loading") as raised:
        engine.wait_ready(limit=60)
    assert "exit status 3" in str(raised.value)
    engine = start_faulty()
    with pytest.raises(TransientFailure, match="ended while loading"):
        engine.wait_ready(limit=60)
