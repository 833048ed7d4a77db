"""The engine process computes the task that it is given, whichever was announced before."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers import engine_process
from consumers.engine_messages import Done
from consumers.engine_process import EngineProcess, Watch
from schemas import parse_task

ALWAYS_IDLE = -1.0


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    engine = EngineProcess("echo")
    engine.spawn()
    engine.wait_ready(limit=60)
    yield engine
    engine.close()


def echo(payload: str) -> str:
    return parse_task({"task_id": payload, "task_type": "echo", "payload": payload}).body().decode()


def computed(engine: EngineProcess, task: str, scratch: Path) -> str:
    answer = engine.run(
        task, str(scratch), {}, watch=Watch(lambda *_: None, lambda: None), time_limit=20, abort_grace=1
    )
    assert isinstance(answer, Done)
    assert answer.output is not None
    payload = json.loads(answer.output)["payload"]
    assert isinstance(payload, str)
    return payload


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("announced", [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["b", "b"]])
def test_it_computes_the_task_it_is_given(
    engine: EngineProcess, tmp_path: Path, announced: list[str], idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_IDLE_SECONDS", ALWAYS_IDLE if idle else math.inf)
    computed(engine, echo("before"), tmp_path)
    for payload in announced:
        engine.prepare(echo(payload))
    assert computed(engine, echo("b"), tmp_path) == "b"


def test_a_run_again_after_another_is_the_tasks_own(
    engine: EngineProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_IDLE_SECONDS", ALWAYS_IDLE)
    engine.prepare(echo("a"))
    assert computed(engine, echo("b"), tmp_path) == "b"
    assert computed(engine, echo("a"), tmp_path) == "a"
