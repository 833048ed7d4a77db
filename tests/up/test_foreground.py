"""The signals that end `inferq up`, over a plan without parts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import sys
from pathlib import Path
from inferq.producer.up import foreground
from inferq.producer.up.plan import Plan

foreground.make_plan = lambda folder, **_: Plan((), {}, {})
wish = foreground.Wish(Path(sys.argv[1]), 0, ())
foreground.keep_up(wish, report=print, when_ready=lambda plan: print("ready", flush=True))
"""


def start(folder: Path, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_under_nohup_it_outlives_the_terminal(tmp_path: Path) -> None:
    process = start(tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
