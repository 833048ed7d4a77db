"""The signals that end `inferq up`, over a plan without parts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import os
import resource
import sys
from pathlib import Path
from inferq.producer.up import foreground
from inferq.producer.up.part import Part
from inferq.producer.up.plan import Plan
from inferq.schemas import InferqError

part = Part("broker", sys.argv[2:], os.environ, lambda: "no answer", start_limit=5)
foreground.make_plan = lambda folder, **_: Plan((part,) if sys.argv[2:] else (), {}, {})
options = foreground.UpOptions(Path(sys.argv[1]), 0, ())


def ready(plan):
    print("ready", *resource.getrlimit(resource.RLIMIT_NOFILE), plan.facts.get("open files"), flush=True)


try:
    foreground.run_until_stopped(options, report=lambda report: None, when_ready=ready)
except InferqError as error:
    print(error.message.replace("\\n", " "), flush=True)
"""


def start(folder: Path, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("ready ")
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=240)
    assert process.returncode == 0


def test_under_nohup_it_outlives_the_terminal(tmp_path: Path) -> None:
    process = start(tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("soft", "hard", "told"),
    [(256, 4096, "ready 4096 4096 None"), (256, 256, "ready 256 256 a process may open 256")],
)
def test_limit_of_open_files_is_raised_or_told(tmp_path: Path, soft: int, hard: int, told: str) -> None:
    process = start_limited(tmp_path, soft, hard)
    assert process.stdout.readline().startswith(told)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)


def test_failed_start_names_the_limit_of_open_files_as_a_possible_cause(tmp_path: Path) -> None:
    out, _ = start_limited(tmp_path, 256, 256, "false").communicate(timeout=240)
    assert out.startswith("broker ended with exit code 1")
    assert "a process may open 256, and RabbitMQ needs 1024 or more" in out
    out, _ = start_limited(tmp_path, 256, 1024, "false").communicate(timeout=240)
    assert "may open" not in out


def start_limited(folder: Path, soft: int, hard: int, *part: str) -> subprocess.Popen[str]:
    limit = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"'
    return subprocess.Popen(
        ["bash", "-c", limit, "bash", sys.executable, "-c", SCRIPT, str(folder), *part],
        stdout=subprocess.PIPE,
        text=True,
    )
