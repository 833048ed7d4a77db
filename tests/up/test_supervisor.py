"""The supervisor over dummy parts: what it starts, keeps running, and leaves behind (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferq.producer.up import orphan_reaper
from inferq.producer.up.folder import DataFolder
from inferq.producer.up.supervisor import Backoff
from inferq.schemas.errors import EXIT_CONFIG
from tests.waiting import eventually

DRIVER = Path(__file__).with_name("driver.py")


class Driven:
    """A supervisor in a process of its own, over the dummy parts that a test orders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.messages: list[dict] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self, *orders: dict) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(self.folder), self.mark, json.dumps(orders)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def read_until(self, key: str) -> dict:
        for line in self.process.stdout:
            self.messages.append(json.loads(line))
            if key in self.messages[-1]:
                return self.messages[-1]
        raise AssertionError(f"ended without {key!r}: {self.messages}")

    def read_stage(self, part: str, stage: str) -> dict:
        while True:
            message = self.read_until("stage")
            if (message["part"], message["stage"]) == (part, stage):
                return message

    def finish(self, seconds: float = 240) -> int:
        out, _ = self.process.communicate(timeout=seconds)
        self.messages += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode

    def left(self) -> list[int]:
        return orphan_reaper.members((), self.mark) + orphan_reaper.members(
            (), self.mark + orphan_reaper.GENTLE
        )

    def journal(self) -> list[str]:
        file = self.folder / "journal"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    made = Driven(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.communicate()
    orphan_reaper.kill_all((), made.mark)
    orphan_reaper.kill_all((), made.mark + orphan_reaper.GENTLE)


def test_starts_what_is_needed_first_and_stops_by_rank(driven: Driven) -> None:
    driven.start(
        {"name": "worker", "needs": ["broker", "index"], "rank": 0, "options": {"stopping": 0.2}},
        {"name": "gateway", "needs": ["broker"], "rank": 10, "options": {"stopping": 0.2}},
        {"name": "broker", "rank": 30, "options": {"loading": 0.3}},
        {"name": "index", "rank": 20},
    )
    driven.read_until("ready")
    starts = driven.journal()
    assert set(starts[:2]) == {"start broker", "start index"}
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0
    assert driven.journal()[4:] == ["stop worker", "stop gateway", "stop index", "stop broker"]
    assert driven.left() == []


def test_stopping_takes_children_and_those_in_sessions_of_their_own_along(driven: Driven) -> None:
    driven.start({"name": "worker", "options": {"children": "group+session"}})
    driven.read_until("ready")
    eventually(lambda: len(driven.left()) == 3, "part and two children")
    driven.process.send_signal(signal.SIGINT)
    assert driven.finish() == 0
    assert driven.left() == []


def test_killed_supervisor_takes_everything_along_and_holds_the_folder_until_then(driven: Driven) -> None:
    driven.start(
        {"name": "broker"},
        {"name": "worker", "options": {"children": "group+session", "stubborn": 1}},
    )
    driven.read_until("ready")
    eventually(lambda: len(driven.left()) == 4, "two parts and two children")
    driven.process.kill()
    driven.process.wait()
    folder = DataFolder(driven.folder / "data")
    folder.hold()  # waits for the guard
    assert driven.left() == []
    folder.release()


def test_gentle_part_of_a_killed_supervisor_may_stop_by_itself(driven: Driven) -> None:
    driven.start(
        {"name": "broker", "gentle": True, "options": {"stopping": 1, "children": "group+session"}},
        {"name": "worker", "options": {"stubborn": 1}},
    )
    driven.read_until("ready")
    eventually(lambda: len(driven.left()) == 4, "two parts and two children")
    driven.process.kill()
    driven.process.wait()
    eventually(lambda: "stop broker" in driven.journal(), "the broker has stopped by itself")
    eventually(lambda: not driven.left(), "its children are gone too")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", [0.0, 0.07, 0.15, 0.3])
def test_signal_at_any_moment_of_the_start_leaves_nothing(
    driven: Driven, number: signal.Signals, moment: float
) -> None:
    driven.start(
        {"name": "broker", "rank": 30, "options": {"loading": 0.1, "children": "group"}},
        {"name": "worker", "needs": ["broker"], "options": {"loading": 0.2, "children": "session"}},
    )
    driven.read_until("armed")
    time.sleep(moment)
    driven.process.send_signal(number)
    code = driven.finish()
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0), f"after {moment:.3f} s"
    eventually(lambda: not driven.left(), f"everything gone, {number.name} after {moment:.3f} s")
    eventually(lambda: not DataFolder(driven.folder / "data").held(), "the folder is free")


def test_part_that_ignores_the_signal_is_killed_after_its_grace(driven: Driven) -> None:
    driven.start({"name": "worker", "grace": 0.5, "options": {"stubborn": 1, "children": "group"}})
    driven.read_until("ready")
    begun = time.monotonic()
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0
    assert time.monotonic() - begun > 0.4
    assert "ignored worker" in driven.journal()
    assert driven.left() == []


def test_second_signal_stops_at_once(driven: Driven) -> None:
    driven.start({"name": "worker", "grace": 60, "options": {"stubborn": 1}})
    driven.read_until("ready")
    driven.process.send_signal(signal.SIGINT)
    driven.read_stage("worker", "stopping")
    driven.process.send_signal(signal.SIGINT)
    assert driven.finish(10) == 0
    assert driven.left() == []


def test_killed_part_is_started_again_without_its_leftovers(driven: Driven) -> None:
    driven.start({"name": "worker", "options": {"children": "group"}}, {"name": "broker"})
    driven.read_until("ready")
    pid = int((driven.folder / "worker.ready").read_text())
    os.kill(pid, signal.SIGKILL)
    ended = driven.read_stage("worker", "ended")
    assert ended["text"] == "was ended by signal 9"
    driven.read_stage("worker", "ready")
    assert int((driven.folder / "worker.ready").read_text()) != pid
    eventually(lambda: len(driven.left()) == 3, "two parts and one child")
    assert driven.journal().count("start broker") == 1
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0


def test_part_that_crashes_on_and_on_is_reported_once_with_its_log(driven: Driven) -> None:
    driven.start({"name": "worker", "options": {"crash": 0.4}}, {"name": "broker"})
    driven.read_stage("worker", "failing")
    eventually(lambda: driven.journal().count("start worker") >= 6, "six lives")
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0
    told = [m for m in driven.messages if m.get("part") == "worker" and m["stage"] in ("ended", "failing")]
    assert [m["stage"] for m in told] == ["ended", "ended", "failing"]
    assert [m["seconds"] for m in told] == [0.05, 0.1, 0.2]
    assert "exit code 3" in told[-1]["text"]
    assert "worker has crashed" in told[-1]["text"]
    assert str(driven.folder / "logs" / "worker.log") in told[-1]["text"]


def test_part_that_worked_for_a_while_is_started_again_soon_each_time(driven: Driven) -> None:
    assert Backoff().steady < 20, "a part that is killed every 20 s works most of the time"
    driven.start({"name": "worker", "steady": 0.01, "options": {"crash": 0.4}})
    for _ in range(4):
        assert driven.read_stage("worker", "ended")["seconds"] == 0.05
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0


def test_start_fails_when_a_part_ends_and_says_what_it_said(driven: Driven) -> None:
    driven.start({"name": "broker"}, {"name": "worker", "needs": ["broker"], "options": {"fails": 7}})
    failed = driven.read_until("failed")["failed"]
    assert failed.startswith("worker ended with exit code 7")
    assert "worker cannot find its weights" in failed
    assert driven.finish() == 1
    assert driven.left() == []


def test_start_fails_when_a_part_is_never_ready(driven: Driven) -> None:
    driven.start({"name": "worker", "limit": 0.5, "options": {"never": 1}}, {"name": "broker"})
    failed = driven.read_until("failed")["failed"]
    assert failed.startswith("worker was not ready within 0 s (not there yet)")
    assert driven.finish() == 1
    assert driven.left() == []


def test_optional_part_that_is_not_installed_is_left_out(driven: Driven) -> None:
    driven.start(
        {"name": "ocr", "optional": True, "options": {"fails": EXIT_CONFIG}},
        {"name": "echo", "optional": True},
    )
    assert driven.read_until("ready") == {"ready": True, "left_out": ["ocr"], "late": []}
    reports = {m["part"]: m["text"] for m in driven.messages if m.get("stage") == "left out"}
    assert reports["ocr"].startswith("ended with exit code 78\n    ocr cannot find its weights")
    eventually(lambda: len(driven.left()) == 1, "only the part that works")
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0
    assert driven.journal().count("start ocr") == 1
    assert driven.left() == []


def test_optional_part_that_fails_for_now_is_retried_and_delays_nothing(driven: Driven) -> None:
    driven.start(
        {"name": "ocr", "optional": True, "options": {"fails": 1, "failures": 2}},
        {"name": "ner", "optional": True, "limit": 0.2, "options": {"loading": 2}},
        {"name": "echo", "optional": True, "options": {"loading": 0.6}},
    )
    ready = driven.read_until("ready")
    assert (ready["left_out"], "ner" in ready["late"]) == ([], True)
    reports = {m["part"]: m["text"] for m in driven.messages if m.get("stage") == "late"}
    assert reports["ocr"].startswith("ended with exit code 1\n    ocr cannot find its weights")
    assert reports["ner"].startswith("was not ready within 0 s")
    driven.read_stage("ner", "ready")
    assert any((m.get("part"), m.get("stage")) == ("ocr", "ready") for m in driven.messages)
    assert sorted(driven.journal()) == ["start echo", "start ner", *3 * ["start ocr"]]
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0
    assert driven.left() == []


def test_start_fails_when_no_optional_part_can_start(driven: Driven) -> None:
    driven.start(
        {"name": "gateway"},
        *({"name": name, "optional": True, "options": {"fails": 1}} for name in ("ocr", "ner")),
    )
    assert "ended with exit code 1" in driven.read_until("failed")["failed"]
    assert driven.finish() == 1
    assert driven.left() == []


def test_start_fails_when_a_program_is_not_there(driven: Driven) -> None:
    driven.start({"name": "worker", "argv": ["/no/such/program"]}, {"name": "broker"})
    assert "/no/such/program" in driven.read_until("failed")["failed"]
    assert driven.finish() == 1
    assert driven.left() == []


def test_signal_during_the_wait_before_a_restart_ends_it(driven: Driven) -> None:
    driven.start({"name": "worker", "options": {"crash": 0.4}})
    driven.read_stage("worker", "failing")
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish(5) == 0
    assert driven.left() == []


def test_log_of_a_part_that_runs_on_is_set_aside_again_and_again(driven: Driven) -> None:
    driven.start({"name": "gateway", "options": {"chatty": 1}})
    driven.read_until("ready")
    old = driven.folder / "logs" / "gateway.log.1"
    for _ in range(2):  # the second time, what was written after the first
        eventually(lambda: old.exists() and old.stat().st_size > 2000, "the log is set aside")
        assert set(old.read_text().splitlines()) == {"gateway has something to say"}
        old.unlink()
    driven.process.send_signal(signal.SIGTERM)
    assert driven.finish() == 0
    assert {entry.name for entry in old.parent.iterdir()} <= {"gateway.log", "gateway.log.1"}
