"""The guard: what it ends once its supervisor is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferq.producer.up import orphan_reaper

HEARS = "import time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + HEARS

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def spawn(script: str, mark: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", script],
            env=os.environ | {orphan_reaper.MARK: mark},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield spawn
    for process in started:
        process.kill()
        process.communicate()


def test_only_what_was_named_and_not_taken_back_or_is_marked_ends(start: Start) -> None:
    mark = uuid.uuid4().hex
    named, taken_back, stranger, marked = start(DEAF), start(DEAF), start(DEAF, mark + "0"), start(DEAF, mark)
    assert orphan_reaper.reap([f"+{named.pid}\n", f"+{taken_back.pid}\n", f"-{taken_back.pid}\n"], mark)
    assert (named.wait(60), marked.wait(60)) == (-9, -9)
    assert (taken_back.poll(), stranger.poll()) == (None, None)


def test_gentle_parts_are_asked_and_killed_only_after_their_grace(start: Start) -> None:
    mark = uuid.uuid4().hex
    hears, deaf = start(HEARS, mark + orphan_reaper.GENTLE), start(DEAF, mark + orphan_reaper.GENTLE)
    # It has to hear the signal within its grace, on a busy machine too.
    assert orphan_reaper.reap([f"~{hears.pid}\n", f"~{deaf.pid}\n"], mark, grace=3)
    assert (hears.wait(60), deaf.wait(60)) == (-15, -9)


def test_what_cannot_be_killed_is_given_up_on(start: Start, monkeypatch) -> None:
    process = start(DEAF)
    monkeypatch.setattr(orphan_reaper.os, "kill", lambda pid, number: None)
    assert not orphan_reaper.kill_all({process.pid}, seconds=0.1)


def test_a_process_between_two_programs_is_looked_at_again(tmp_path: Path) -> None:
    """Within execve(2) it has memory, and no environment yet."""

    def write(environment: bytes, end: int) -> None:
        fields = ["R", *["0"] * 19, "4096", *["0"] * 27, str(end), "0"]
        stat = f"7 (a) b) {' '.join(fields)}\n"
        for name, content in (("environ", environment), ("stat", stat.encode())):
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(tmp_path / name)  # never seen half written

    write(b"", 0)
    with ThreadPoolExecutor(1) as thread:
        looking = thread.submit(orphan_reaper.environment, tmp_path, seconds=60)
        with pytest.raises(TimeoutError):
            looking.result(0.1)
        write(b"A=1\0", 4096)
        assert looking.result(60) == b"A=1\0"
    write(b"", 4096)
    assert orphan_reaper.environment(tmp_path, seconds=60) == b""
