"""The first engine process starts before the worker imports what it needs itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from inferq.consumers.runtime import start
from inferq.consumers.runtime.process import EngineProcess
from inferq.consumers.worker import cli

_WHAT_IS_IMPORTED = """
import json, sys
from inferq.consumers.runtime import start
from inferq.producer.cli.main import main

def stop(type_name):
    print(json.dumps([type_name, sorted(sys.modules)]))
    sys.exit(0)

start.start_ahead = stop
sys.argv = ["inferq", "worker", "echo", "--slots", "2"]
main()
"""


def test_an_engine_takes_over_the_process_that_was_started_ahead() -> None:
    start.start_ahead("echo")
    ahead = start._ahead["echo"].process.pid
    first, second = EngineProcess("echo"), EngineProcess("echo")
    try:
        first.spawn()
        second.spawn()
        assert first.pid == ahead != second.pid
        assert first.wait_ready(limit=60).name == "echo"
    finally:
        first.close()
        second.kill()


def test_a_process_that_ended_before_it_was_taken_over_counts_as_one_that_ended_while_loading() -> None:
    start.start_ahead("no-such-type")
    engine = EngineProcess("no-such-type")
    engine.spawn()
    with pytest.raises(Exception, match="ended while loading"):
        engine.wait_ready(limit=60)


def test_a_machine_that_cannot_start_it_says_so_when_the_engine_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_arguments: object, **_more: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(start, "start_engine", full)
    start.start_ahead("echo")
    with pytest.raises(BlockingIOError):
        EngineProcess("echo").spawn()


@pytest.mark.parametrize(
    ("arguments", "environment", "started"),
    [
        (["echo,ner"], {}, ["echo", "ner"]),
        (["echo"], {"INFERQ_LOAD": "lazy"}, []),
        (["echo,ner", "--max-loaded", "1"], {}, []),
        (["echo,ner"], {"INFERQ_MAX_LOADED": "1"}, []),
        (["echo", "--check"], {}, []),
    ],
)
def test_only_engines_that_load_at_the_start_are_started_ahead(
    arguments: list[str], environment: dict[str, str], started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli, "start_ahead", seen.append)
    for name, value in (environment | {"INFERQ_SLOTS": "none"}).items():  # the next step fails
        monkeypatch.setenv(name, value)
    CliRunner().invoke(cli.app, arguments)
    assert seen == started


def test_the_command_starts_its_engine_before_it_imports_what_only_the_worker_needs() -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-c", _WHAT_IS_IMPORTED], capture_output=True, check=True, timeout=60
    )
    type_name, modules = json.loads(said.stdout)
    assert type_name == "echo"
    slow = {"inferq.schemas", "inferq.broker", "inferq.storage", "rich.console", "prometheus_client"}
    assert not slow & set(modules)
