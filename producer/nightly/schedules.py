"""What is to run by night: the tables of `schedules.toml`, each a schedule of its own name."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from inferq.producer.batch.checks import check_files, check_lines
from inferq.producer.batch.lines import defaults_of
from inferq.producer.batch.sources import JSONL_ENDINGS, is_prefix
from inferq.producer.nightly.cron import Cron
from inferq.schemas import (
    DEFAULT_IN_FLIGHT,
    Batch,
    CallbackUrl,
    InferqError,
    InvalidTask,
    Priority,
    ScheduleName,
    TimeZoneName,
    Window,
)
from inferq.schemas.task import Tenant, TypeName


class SchedulesUnusable(InferqError):
    """The file of schedules cannot be read, or says what cannot be."""

    code = "bad_schedules"


class Schedule(BaseModel):
    """One table of the file; its name is the table's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ScheduleName
    cron: str = Field(description="Minute, hour, day of the month, month, day of the week.")
    time_zone: TimeZoneName = Field("UTC", description="What the cron and the window are told in.")
    source: str = Field(
        pattern="^s3://[^/]+", description="`s3://bucket/prefix`, or `s3://bucket/file.jsonl`."
    )
    only_new: bool = Field(
        False, description="Only what is new since the last run; the default of a prefix is true."
    )
    task_type: TypeName | None = None
    options: dict[str, JsonValue] = {}
    defaults: dict[str, JsonValue] = Field({}, description="Further fields of every task.")
    priority: Priority = "low"
    window: str | None = Field(None, description="The hours in which it is fed, as `22:00-06:00`.")
    max_in_flight: int = Field(DEFAULT_IN_FLIGHT, ge=1, le=1_000_000)
    callback: CallbackUrl | None = Field(None, description="Where to tell what each night came to.")
    tenant: Tenant = "default"

    @model_validator(mode="before")
    @classmethod
    def _settle_only_new(cls, given: Any) -> Any:
        if isinstance(given, dict) and "only_new" not in given and isinstance(given.get("source"), str):
            return given | {"only_new": not given["source"].endswith(JSONL_ENDINGS)}
        return given

    @field_validator("cron")
    @classmethod
    def _fires(cls, value: str) -> str:
        Cron(value)
        return value

    @field_validator("window")
    @classmethod
    def _is_a_window(cls, value: str | None) -> str | None:
        if value is not None:
            _window(value, "UTC")
        return value

    @model_validator(mode="after")
    def _has_what_can_be_new(self) -> Self:
        if self.only_new and self.source.endswith(JSONL_ENDINGS):
            raise ValueError(
                "only_new is for a prefix, whose objects can be told apart: leave it out for a file"
            )
        return self

    @property
    def times(self) -> Cron:
        return Cron(self.cron, self.time_zone)

    @property
    def feeding_window(self) -> Window | None:
        return None if self.window is None else _window(self.window, self.time_zone)

    def batch(self, scheduled_at: datetime, **about: JsonValue) -> Batch:
        """The batch that is its run of that time; `about` goes into the metadata."""
        return Batch(
            batch_id=run_id_of(self.name, scheduled_at),
            tenant=self.tenant,
            source=self.source,
            task_type=self.task_type,
            defaults={**self.defaults, **({"options": self.options} if self.options else {})},
            priority=self.priority,
            max_in_flight=self.max_in_flight,
            window=self.feeding_window,
            schedule=self.name,
            metadata={"scheduled_at": scheduled_at.astimezone(UTC).isoformat(), **about},
            created_at=datetime.now(UTC),
        )

    def check(self) -> None:
        """Raises InvalidTask where no object or line of the source could become a task."""
        try:
            prefix = is_prefix(self.source)
        except InvalidTask as error:
            raise InvalidTask(f"source {self.source}: {error.message}") from error
        given = defaults_of(self.batch(datetime(2026, 1, 1, tzinfo=UTC)))
        if prefix:
            check_files(given)
        else:
            check_lines(given)


_EXPECTED = {
    "source": "give s3://bucket/prefix, or s3://bucket/file.jsonl",
    "task_type": "give the name of a task type, such as ocr",
    "callback": "give an http:// or https:// URL",
    "tenant": "a tenant's name is 1-64 of A-Z a-z 0-9 . _ -",
}
"""What is said of a value in the place of the pattern that it should match."""

_KEYS = tuple(key for key in Schedule.model_fields if key != "name")


def run_id_of(name: str, scheduled_at: datetime) -> str:
    """The id of a schedule's run of that time, which is its batch's; for one time always the same."""
    return f"{name}-{scheduled_at.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def read_schedules(path: Path) -> dict[str, Schedule]:
    """The schedules in a file, by name. Raises SchedulesUnusable, naming each fault by table and key."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError as error:
        raise SchedulesUnusable(
            f"there is no file {path}: write one, or say where it is by INFERQ_SCHEDULES_FILE"
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
            faults.append(f"{name}: stands outside a table; every schedule is a table, as [{name}]")
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
        raise SchedulesUnusable(f"{name}.name: a schedule's name is its table's: leave it out")
    try:
        schedule = Schedule.model_validate({**table, "name": name})
        schedule.check()
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
                what = f"is unknown; there are {', '.join(_KEYS)}"
            case _, ["name"]:
                path, what = [], "a schedule's name is 1-64 of A-Z a-z 0-9 _ -"
            case "string_pattern_mismatch", [key] if key in _EXPECTED:
                what = _EXPECTED[key]
            case _:
                what = fault["msg"].removeprefix("Value error, ")
        yield f"{'.'.join([name, *path])}: {what}"


def _window(text: str, zone: str) -> Window:
    start, dash, end = (part.strip() for part in text.partition("-"))
    if not dash:
        raise ValueError("write the window as 22:00-06:00")
    try:
        return Window(start=start, end=end, time_zone=zone)
    except ValidationError as error:
        raise ValueError(
            "write the window as 22:00-06:00, with hours up to 23 and minutes up to 59"
        ) from error
