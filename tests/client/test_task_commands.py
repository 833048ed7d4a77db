"""Failures of `inferq submit`, against a running gateway."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from inferq.producer.client.errors import Unavailable
from inferq.producer.client.sync_client import Client
from inferq.schemas import Result
from tests.gateway.conftest import FakePublisher, Gateway
from tests.installation import inferq_here

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(lone_gateway: Gateway) -> Command:
    env = {"INFERQ_API_URL": lone_gateway.url, "INFERQ_API_KEY": lone_gateway.key}
    return lambda *arguments: inferq_here(env, "submit", *arguments)


def lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in run.stderr
    return run.stderr.splitlines()


@pytest.mark.parametrize("more", ["--wait", "--json"])
def test_a_failure_names_the_tasks_accepted_before_it(
    submit: Command, publisher: FakePublisher, more: str
) -> None:
    run = submit("echo", "1", "2", "x" * 70_000, more)
    assert run.returncode == 1
    accepted, error = lines(run)
    assert publisher.ids() == accepted.split()[-2:]
    assert "accepted" in accepted
    assert error.startswith("error:")


def test_ids_on_standard_output_are_not_repeated_on_failure(
    submit: Command, publisher: FakePublisher
) -> None:
    run = submit("echo", "1", "x" * 70_000)
    assert run.returncode == 1
    assert run.stdout.split() == publisher.ids()
    assert len(lines(run)) == 1


def test_a_failed_task_prints_its_error_alone(
    submit: Command, lone_gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "events", lambda self, task_id: iter(()))
    monkeypatch.setattr(
        Client, "result", lambda self, task_id, wait: lone_gateway.end(lone_gateway.task(task_id), "failed")
    )
    run = submit("echo", "1", "--wait")
    assert run.returncode == 1
    assert [line.partition(" ")[0] for line in lines(run)] == ["error:"]


@pytest.mark.parametrize(
    ("fault", "status"), [(Unavailable("away", code="unreachable"), 1), (KeyboardInterrupt(), 130)]
)
@pytest.mark.parametrize("as_json", [True, False])
def test_results_are_shown_even_if_later_ones_cannot_be_fetched(
    submit: Command,
    publisher: FakePublisher,
    lone_gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    status: int,
    as_json: bool,
) -> None:
    fetched: list[str] = []

    def result(self: Client, task_id: str, wait: float) -> Result:
        if fetched:
            raise fault
        fetched.append(task_id)
        return lone_gateway.end(lone_gateway.task(task_id))

    monkeypatch.setattr(Client, "events", lambda self, task_id: iter(()))
    monkeypatch.setattr(Client, "result", result)
    run = submit("echo", "1", "2", "3", "--wait", *(["--json"] if as_json else []))
    assert run.returncode == status
    assert lines(run)[0].split()[-3:] == publisher.ids()
    if as_json:
        assert [each["task_id"] for each in json.loads(run.stdout)] == fetched
    else:
        assert fetched[0] in run.stdout


@pytest.mark.parametrize(
    ("assignment", "instead"),
    [
        ("priority=high", "--priority"),
        ("callback_url=https://example.com/", "--callback"),
        ("task_id=mine", "--id"),
        ("task_type=ocr", "TYPE"),
    ],
)
def test_a_field_with_its_own_option_cannot_be_set_otherwise(
    submit: Command, publisher: FakePublisher, assignment: str, instead: str
) -> None:
    run = submit("echo", "1", "--set", assignment)
    assert run.returncode == 1
    (line,) = lines(run)
    assert instead in line
    assert publisher.ids() == []


def test_a_time_is_set_as_text(submit: Command, publisher: FakePublisher) -> None:
    run = submit("echo", "1", "--set", "expires_at=2100-01-01T00:00:00Z")
    assert run.returncode == 0, run.stderr
    assert json.loads(publisher.messages[0].body)["expires_at"] == "2100-01-01T00:00:00Z"


@pytest.mark.parametrize("assignment", ["expires_at=soon", "metadata=5", "metadata=x", "callback_events=5"])
def test_a_value_of_the_wrong_type_is_refused_by_the_gateway(
    submit: Command, publisher: FakePublisher, assignment: str
) -> None:
    run = submit("echo", "1", "--set", assignment)
    assert run.returncode == 1
    (line,) = lines(run)
    assert assignment.partition("=")[0] in line
    assert publisher.ids() == []


def test_an_unusable_output_folder_is_an_error_before_submission(
    submit: Command, publisher: FakePublisher, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "out"):
        run = submit("echo", "1", "--out", str(out))
        assert run.returncode == 1
        (line,) = lines(run)
        assert str(out) in line
    assert publisher.ids() == []
    (tmp_path / "batch.jsonl").write_text("{}\n")
    invalid = {"INFERQ_API_URL": "ftp://x"}  # its error would come first if the folder were checked later
    run = inferq_here(invalid, "batch", "submit", str(tmp_path / "batch.jsonl"), "--out", str(file))
    assert lines(run) == [f"error: {file}: File exists"]
    run = inferq_here(invalid, "batch", "status", "b", "--out", str(file))
    assert lines(run) == [f"error: {file}: File exists"]


def test_an_unreadable_file_is_one_line(submit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Client, file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Client, "upload", refuse)
    run = submit("ocr", __file__)
    assert run.returncode == 1
    assert lines(run) == [f"error: {__file__}: Permission denied"]
