"""What tenants used: engine seconds and tasks, of each task type on each UTC day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from inferq.storage.status.connection import RedisConnection

USAGE_DAYS = 400
"""How many days Redis keeps the usage of a day; as in usage.lua."""


@dataclass(frozen=True)
class Usage:
    """What one tenant used on one UTC day, of one task type.

    The first three count tasks, by how a worker ended them. `retried` counts failed attempts that another one followed.
    `engine_seconds` is the time of all these runs in an engine, also of those that failed or were cancelled.
    """

    day: date
    tenant: str
    task_type: str
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    engine_seconds: float = 0.0

    @property
    def tasks(self) -> int:
        """The tasks that ended."""
        return self.succeeded + self.failed + self.cancelled


def usage_key(day: date) -> str:
    """The key of a day's hash."""
    return f"inferq:usage:{day.isoformat()}"


def spent_on(moment: datetime, engine_seconds: float | None) -> Sequence[str]:
    """The arguments of a script for the usage: the day and microseconds, or an empty day for none."""
    if engine_seconds is None:
        return ["", "0"]
    return [moment.astimezone(UTC).date().isoformat(), str(round(engine_seconds * 1e6))]


def mean_seconds(used: Iterable[Usage]) -> dict[str, float]:
    """The mean engine seconds of a task that ended, by type. A type of which none ended is absent."""
    spent: dict[str, tuple[int, float]] = {}
    for each in used:
        tasks, seconds = spent.get(each.task_type, (0, 0.0))
        spent[each.task_type] = tasks + each.tasks, seconds + each.engine_seconds
    return {name: round(seconds / tasks, 6) for name, (tasks, seconds) in spent.items() if tasks}


class UsageRecords(RedisConnection):
    """Reads the usage that the runs have recorded."""

    def usage(self, days: Iterable[date]) -> list[Usage]:
        """The usage of these days, by day, tenant and type. Raises StatusOutage."""
        wanted = list(days)
        replies = self.read(*(("HGETALL", usage_key(day)) for day in wanted))
        return [
            used
            for day, fields in zip(wanted, replies, strict=True)
            for used in _read_day(day, fields.items())
        ]


def _read_day(day: date, fields: Iterable[tuple[str, str]]) -> list[Usage]:
    found: dict[tuple[str, str], dict[str, int]] = {}
    for name, value in fields:
        tenant, task_type, counted = name.split(":")
        found.setdefault((tenant, task_type), {})[counted] = int(value)
    return [
        Usage(
            day, tenant, task_type,
            succeeded=counts.get("succeeded", 0), failed=counts.get("failed", 0),
            cancelled=counts.get("cancelled", 0), retried=counts.get("retried", 0),
            engine_seconds=counts.get("us", 0) / 1e6,
        )
        for (tenant, task_type), counts in sorted(found.items())
    ]  # fmt: skip
