"""A nightly schedule, in `schedules.toml` and in the job that starts a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from inferq.schemas.batch import DEFAULT_IN_FLIGHT, Batch, ScheduleName
from inferq.schemas.batch_source import JSONL_ENDINGS
from inferq.schemas.cron import Cron
from inferq.schemas.record import Record
from inferq.schemas.task import CallbackUrl, Priority, Tenant, TypeName
from inferq.schemas.window import TimeZoneName, Window


class Schedule(Record):
    """One table of the file. Its name is the name of the table."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: ScheduleName
    cron: str = Field(description="Minute, hour, day of the month, month, day of the week.")
    time_zone: TimeZoneName = Field("UTC", description="The time zone of the cron and the window.")
    source: str = Field(
        pattern="^s3://[^/]+", description="`s3://bucket/prefix`, or `s3://bucket/file.jsonl`."
    )
    only_new: bool = Field(
        False, description="Only objects that are new since the last run. The default for a prefix is true."
    )
    task_type: TypeName | None = None
    options: dict[str, JsonValue] = Field({})
    defaults: dict[str, JsonValue] = Field({}, description="Further fields of every task.")
    priority: Priority = "low"
    window: str | None = Field(None, description="The hours in which it is fed, as `22:00-06:00`.")
    max_in_flight: int = Field(DEFAULT_IN_FLIGHT, ge=1, le=1_000_000)
    callback: CallbackUrl | None = Field(None, description="The URL to notify of each night.")
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
        """The batch of the run at that time. `about` goes into the metadata."""
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


def run_id_of(name: str, scheduled_at: datetime) -> str:
    """The id of a schedule's run at that time, and of its batch. One time always gives the same id."""
    return f"{name}-{scheduled_at.astimezone(UTC):%Y%m%dT%H%M%SZ}"


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
