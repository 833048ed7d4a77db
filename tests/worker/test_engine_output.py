"""What an engine process prints is in the log, with the context of its task, and nothing of it holds up anybody."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars

from inferq.consumers.runtime.output import BURST_LINES, LINE_CHARACTERS, EngineOutput
from inferq.consumers.runtime.process import EngineProcess
from inferq.consumers.worker.engine_supervisor import EngineSupervisor
from inferq.consumers.worker.loaded_engines import LoadedEngines
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.settings import WorkerSettings
from inferq.schemas import get_type
from tests.logged import logged
from tests.waiting import eventually
from tests.worker.conftest import PLUGIN
from tests.worker.test_engine_process import UNWATCHED

_ENGINE = """
import ctypes, logging, os, sys
from inferq.consumers.runtime.output import flush_output, log_engine, start_engine_log
start_engine_log()
log_engine("engine.of_a_plug_in:Engine")
logging.getLogger("httpx").info("GET https://host/weights?signature=secret")
print("from Python")
os.write(2, b"from the descriptor\\n")
ctypes.CDLL(None).puts(b"from C")
logging.getLogger("engine").info("logged\\nin two lines")
logging.getLogger("engine").debug("for nobody")
try:
    raise ValueError("why")
except ValueError:
    logging.getLogger("engine").exception("failed")
sys.stderr.write("\\r10 %\\r50 %\\r100 %\\n")
print("half a line", end="")
flush_output()
os.abort()
"""


class Engine:
    """The other end of an engine's output."""

    def __init__(self) -> None:
        self.dropped = 0
        self.output = EngineOutput(self._drop)
        self.end = os.dup(self.output.writer)
        self.output.start()

    def _drop(self, count: int) -> None:
        self.dropped += count

    def print(self, text: bytes) -> None:
        os.write(self.end, text)

    def close(self) -> None:
        """Close it, and wait until all is logged: a later test must not find lines of this one."""
        close(self.output)


def close(output: EngineOutput) -> None:
    output.close()
    eventually(lambda: not output._logging.is_alive())


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    with logged("inferq.engine", logging.INFO) as lines:
        yield lines


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    os.close(engine.end)
    engine.close()


def said(lines: list[dict[str, Any]]) -> list[str]:
    return [line["message"].removeprefix("engine: ") for line in lines]


def test_what_python_c_and_loggers_print_is_logged_line_by_line(lines: list[dict[str, Any]]) -> None:
    output = EngineOutput(lambda _count: None)
    process = subprocess.Popen(
        [sys.executable, "-c", _ENGINE],
        stdout=output.writer,
        stderr=output.writer,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "INFERQ_LOG_LEVEL": "INFO"},
    )
    output.start()
    process.wait(60)
    close(output)
    assert said(lines) == [
        "from Python", "from the descriptor", "from C", "logged\nin two lines", "failed", "100 %", "half a line",
    ]  # fmt: skip
    assert [line["level"] for line in lines] == ["INFO"] * 4 + ["ERROR"] + ["INFO"] * 2
    assert lines[4]["exception"].endswith("ValueError: why")


def test_a_line_is_of_the_task_that_runs_when_it_is_printed(
    engine: Engine, lines: list[dict[str, Any]]
) -> None:
    engine.print(b"loads\n")
    eventually(lambda: said(lines) == ["loads"])
    for task in ("a", "b"):
        with bound_contextvars(task_id=task):
            engine.output.begin_run()
        engine.print(b"computes %b\nnot to its end" % task.encode())
        engine.output.end_run()
    engine.print(b"idles\n")
    eventually(lambda: len(lines) == 6)
    assert [(line.get("task_id"), text) for line, text in zip(lines, said(lines), strict=True)] == [
        (None, "loads"), ("a", "computes a"), ("a", "not to its end"), ("b", "computes b"), ("b", "not to its end"),
        (None, "idles"),
    ]  # fmt: skip


def test_a_flood_is_cut_and_counted(engine: Engine, lines: list[dict[str, Any]]) -> None:
    for number in range(100):
        engine.print(b"".join(b"%d.%d\n" % (number, line) for line in range(100)))
    engine.close()
    kept = [text for text in said(lines) if "lines dropped" not in text]
    assert kept[:BURST_LINES] == [f"{number}.{line}" for number in range(2) for line in range(100)]
    assert len(kept) + engine.dropped == 100 * 100
    told = [text.removesuffix(" lines dropped: the engine prints too fast") for text in said(lines)]
    assert sum(int(text) for text in told if text.isdigit()) == engine.dropped
    assert engine.dropped > 100 * 100 / 2


def test_the_worker_counts_the_lines_of_its_engines_that_are_left_out() -> None:
    metrics = WorkerMetrics()
    services: Any = SimpleNamespace(
        settings=WorkerSettings(), metrics=metrics, task_type=get_type("echo"), loaded_engines=LoadedEngines()
    )
    EngineSupervisor("slot 0", services).engine._lines_dropped(3)
    assert metrics.registry.get_sample_value("inferq_engine_output_lines_dropped_total") == 3


def test_a_long_line_is_cut(engine: Engine, lines: list[dict[str, Any]]) -> None:
    for size in (LINE_CHARACTERS, LINE_CHARACTERS + 1, 1_000_000):
        engine.print(b"x" * size + b"\nafter it\n")
    engine.close()
    cut = "x" * LINE_CHARACTERS + "... (cut)"
    assert said(lines) == ["x" * LINE_CHARACTERS, "after it", cut, "after it", cut, "after it"]


def test_neither_a_log_that_blocks_nor_a_pipe_that_stays_open_holds_up_anybody(engine: Engine) -> None:
    going_on = threading.Event()

    class Blocks(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            going_on.wait(60)

    logger, handler = logging.getLogger("inferq.engine"), Blocks()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        began = time.monotonic()
        engine.print(b"stuck\n" * 1_000_000)  # returns once it is read
        engine.output.end_run()
        engine.output.close()  # though `engine.end` stays open, as with a daemon
        assert time.monotonic() - began < 30
        engine.print(b"from a daemon\n" * 100_000)
        assert not going_on.is_set()
    finally:
        going_on.set()
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_a_record_that_is_none_is_a_line(engine: Engine, lines: list[dict[str, Any]]) -> None:
    engine.print(b'\x1e{"level": "high"}\n\x1enot JSON\n\x1e7\n\xff\n')
    engine.close()
    assert [json.dumps(text)[:8] for text in said(lines)] == [
        '"\\u001e{',
        '"\\u001en',
        '"\\u001e7',
        '"\\ufffd"',
    ]


def test_an_engine_process_has_its_task_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN), prepend=os.pathsep)
    engine = EngineProcess("faulty")
    engine.spawn()
    engine.wait_ready(limit=60)
    try:
        for task in ("one", "two"):
            body = json.dumps({"task_id": task, "task_type": "faulty"})
            with bound_contextvars(task_id=task):
                engine.run(body, str(tmp_path), {}, watch=UNWATCHED, time_limit=20, abort_grace=1)
    finally:
        engine.close()
    eventually(lambda: len(lines) == 2)
    assert [(line["task_id"], line["message"]) for line in lines] == [
        ("one", "engine: engines print things"),
        ("two", "engine: engines print things"),
    ]
