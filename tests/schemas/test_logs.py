"""A log's lines, whatever the text in them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars
from typer.testing import CliRunner

from inferq.producer.cli.main import app
from inferq.schemas import InstallationError
from inferq.schemas.logs import LineFormatter, LogFormat, LogSettings, PartFormatter, fields

FORGED = "x\n2026-11-30 10:00:00,000 INFO all is well\r\x1b[2J\u2028\x85\tü\udce9"


def formatted(
    formatter: logging.Formatter, *arguments: object, error: BaseException | None = None, **more: object
) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("a", logging.ERROR, "", 1, "url %r: %s", arguments, info)
    record.created = 1_795_000_000.25
    record.exc_text = "as another formatter wrote it\n2026"
    vars(record).update(fields(**more))
    return formatter.format(record)


def as_json(*arguments: object, error: BaseException | None = None, **more: object) -> dict[str, Any]:
    line = formatted(PartFormatter("json", "gateway"), *arguments, error=error, **more)
    assert line.isascii()
    assert line.isprintable()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(
    ("formatter", "begin"),
    [(PartFormatter("text", "gateway"), "2026-11-18T11:06:40.250Z ERROR gateway: "), (LineFormatter(), "")],
    ids=["part", "command"],
)
def test_text_in_a_message_neither_begins_a_line_nor_moves_the_cursor(
    formatter: logging.Formatter, begin: str
) -> None:
    line = formatted(formatter, "u", FORGED)
    assert line == (
        begin
        + r"url 'u': x\u000a2026-11-30 10:00:00,000 INFO all is well\u000d\u001b[2J\u2028\u0085"
        + "\tü"
        + r"\udce9"
    )


@pytest.mark.parametrize(
    "formatter", [PartFormatter("text", "gateway"), LineFormatter()], ids=["part", "command"]
)
def test_lines_of_a_stack_are_indented_and_hold_no_control_characters(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        first, *others = formatted(formatter, "u", "v", error=error).split("\n")
    assert first.endswith("url 'u': v")
    assert "  Traceback (most recent call last):" in others
    assert (
        r"  2026-11-30 10:00:00,000 INFO all is well\u000d\u001b[2J\u2028\u0085" + "\tü" + r"\udce9" in others
    )
    assert all(line.startswith("  ") for line in others)


def test_json_is_one_object_with_the_stack_as_a_field() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        line = as_json("u", FORGED, error=error)
    assert line.pop("exception").startswith("Traceback (most recent call last):\n")
    assert line == {
        "time": "2026-11-18T11:06:40.250Z",
        "level": "ERROR",
        "part": "gateway",
        "message": f"url 'u': {FORGED}",
        "logger": "a",
    }


def test_a_line_has_the_bound_context_and_its_own_fields_as_far_as_they_are_known() -> None:
    with bound_contextvars(task_id="a b", attempt=2, trace_id=None):
        line = as_json(1, 2, seconds=0.5, missing=None, note='say "so"\n')
        text = formatted(PartFormatter("text", "worker", {"task_type": "ocr"}), 1, 2, note='say "so"\n')
    assert list(line)[4:] == ["task_id", "attempt", "logger", "seconds", "note"]
    assert (line["task_id"], line["attempt"], line["seconds"]) == ("a b", 2, 0.5)
    assert text.endswith(r'url 1: 2 task_id="a b" task_type=ocr attempt=2 note="say \"so\"\n"')
    assert "task_id" not in as_json(1, 2)


@pytest.mark.parametrize(
    ("terminal", "setting", "form"),
    [(True, "", "text"), (False, "", "json"), (True, "json", "json"), (False, "text", "text")],
)
def test_people_get_text_and_machines_json(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, setting: str, form: LogFormat
) -> None:
    monkeypatch.setenv("INFERQ_LOG_FORMAT", setting)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert LogSettings.load().form == form


@pytest.mark.parametrize("command", ["gateway", "worker echo", "callbacks", "beat", "monitor"])
def test_an_unknown_form_is_refused_before_a_part_starts(tmp_path: Path, command: str) -> None:
    (tmp_path / "schedules.toml").touch()
    env = {"INFERQ_LOG_FORMAT": "xml", "INFERQ_SCHEDULES_FILE": str(tmp_path / "schedules.toml")}
    ended = CliRunner().invoke(app, [*command.split(), "--check"], env=env)
    assert isinstance(ended.exception, InstallationError)
    assert str(ended.exception) == "INFERQ_LOG_FORMAT: Input should be 'text' or 'json'"


def test_every_part_sets_up_its_log_in_one_place() -> None:
    root = Path(__file__).parents[2]
    calls = [
        str(file.relative_to(root))
        for room in ("broker", "consumers", "producer", "schemas", "storage")
        for file in (root / room).rglob("*.py")
        if "basicConfig(" in file.read_text("utf-8")
    ]
    # An engine process writes to its worker, which logs it.
    assert calls == ["consumers/runtime/output.py", "schemas/logs.py"]
