"""Reads `schedules.toml`: each table is a schedule, and its name is the schedule's."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from inferq.producer.batch.checks import check_files, check_lines
from inferq.schemas import (
    InferqError,
    InvalidTask,
)
from inferq.schemas.batch_source import defaults_of, is_prefix
from inferq.schemas.schedule import Schedule


class SchedulesUnusable(InferqError):
    """The file of schedules cannot be read, or a schedule in it is invalid."""

    code = "bad_schedules"


_EXPECTED = {
    "source": "give s3://bucket/prefix, or s3://bucket/file.jsonl",
    "task_type": "give the name of a task type, such as ocr",
    "callback": "give an http:// or https:// URL",
    "tenant": "a tenant's name is 1-64 of A-Z a-z 0-9 . _ -",
}
"""The message for a value that does not match its pattern, by key."""

_KEYS = tuple(key for key in Schedule.model_fields if key != "name")


def read_schedules(path: Path) -> dict[str, Schedule]:
    """The schedules in a file, by name. Raises SchedulesUnusable, naming each fault by table and key."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError as error:
        raise SchedulesUnusable(
            f"there is no file {path}: write one, or set INFERQ_SCHEDULES_FILE to its path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SchedulesUnusable(f"{path} cannot be read: {error}") from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SchedulesUnusable(f"{path} is not TOML: {error}") from error
    found: dict[str, Schedule] = {}
    faults: list[str] = []
    for name, table in tables.items():
        if not isinstance(table, dict):
            faults.append(f"{name}: is outside a table; write each schedule as a table, such as [{name}]")
            continue
        try:
            found[name] = _schedule(name, table)
        except SchedulesUnusable as error:
            faults.append(error.message)
    if faults:
        raise SchedulesUnusable(f"{path}: {'; '.join(faults)}")
    return found


def _schedule(name: str, table: dict[str, Any]) -> Schedule:
    if "name" in table:
        raise SchedulesUnusable(
            f"{name}.name: the name of the table is the schedule's name: leave this key out"
        )
    try:
        schedule = Schedule.model_validate({**table, "name": name}, extra="forbid")
        check_schedule(schedule)
    except ValidationError as error:
        raise SchedulesUnusable("; ".join(_faults(name, error))) from error
    except InvalidTask as error:
        raise SchedulesUnusable(f"{name}: {error.message}") from error
    return schedule


def _faults(name: str, error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        path = [str(part) for part in fault["loc"]]
        match fault["type"], path:
            case "missing", _:
                what = "is missing"
            case "extra_forbidden", _:
                what = f"is unknown; known keys are {', '.join(_KEYS)}"
            case _, ["name"]:
                path, what = [], "a schedule's name is 1-64 of A-Z a-z 0-9 _ -"
            case "string_pattern_mismatch", [key] if key in _EXPECTED:
                what = _EXPECTED[key]
            case _:
                what = fault["msg"].removeprefix("Value error, ")
        yield f"{'.'.join([name, *path])}: {what}"


def check_schedule(schedule: Schedule) -> None:
    """Raise InvalidTask if no object or line of the source can become a task."""
    try:
        prefix = is_prefix(schedule.source)
    except InvalidTask as error:
        raise InvalidTask(f"source {schedule.source}: {error.message}") from error
    given = defaults_of(schedule.batch(datetime(2026, 1, 1, tzinfo=UTC)))
    if prefix:
        check_files(given)
    else:
        check_lines(given)
