"""A task's fields as Redis keeps them: short names, microseconds, cursors."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from inferq.schemas import (
    ErrorInfo,
    Event,
    EventData,
    EventType,
    InvalidTask,
    State,
    Task,
    TaskStatus,
)
from inferq.schemas.encoding import to_json

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

CURSOR_PATTERN = r"^-?[0-9]{1,20}:[A-Za-z0-9._:-]{1,128}$"
"""All cursors, and no other strings."""


def task_fields(task: Task, digest: str | None = None, trace_id: str | None = None) -> list[Any]:
    """The arguments with which a script records a task. `digest` avoids computing it again."""
    digest = digest or task.digest()
    place = place_of(task.batch_id, task.batch_line, trace_id)
    return [task.task_type, task.priority, place, digest, micros(task.created_at)]


def place_of(batch_id: str | None, line: int | None, trace_id: str | None) -> str:
    """A task's batch and trace for the scripts: `<batch_id>/<line>@<trace_id>`, each if there is one.

    A batch id has neither a slash nor an at sign.
    """
    place = "" if batch_id is None else batch_id if line is None else f"{batch_id}/{line}"
    return f"{place}@{trace_id}" if trace_id else place


def event_json(
    kind: EventType,
    task: Task,
    state: State,
    *,
    attempt: int = 1,
    redrives: int = 0,
    at: datetime | None = None,
    error: ErrorInfo | None = None,
    trace_id: str | None = None,
) -> str:
    """The JSON of an event of an unfinished task."""
    data = EventData.of(
        task,
        state,
        attempt=attempt,
        redrives=redrives,
        error=error,
        metadata=task.metadata,
        trace_id=trace_id,
    )
    return to_json(Event(type=kind, timestamp=at or datetime.now(UTC), data=data))


def read_status(tenant: str, task_id: str, fields: list[Any]) -> TaskStatus:
    """The status in a hash; `fields` are its names and values, alternating."""
    record = dict(zip(fields[::2], fields[1::2], strict=True))
    error = record.get("e")
    return TaskStatus(
        task_id=task_id,
        task_type=record.get("ty", ""),
        tenant=tenant,
        state=record["s"],
        attempt=int(record.get("a", 1)),
        redrives=int(record.get("r", 0)),
        priority=record.get("p") or "normal",
        progress=float(record["g"]) if "g" in record else None,
        progress_note=record.get("n") or None,
        batch_id=record.get("b") or None,
        worker=record.get("w") or None,
        error=ErrorInfo.model_validate_json(error) if error else None,
        created_at=_time(record.get("c")),
        started_at=_time(record.get("st")),
        finished_at=_time(record.get("f")),
        cancel_requested="x" in record,
        trace_id=record.get("tr") or None,
    )


def as_text(value: Any) -> Any:
    """A script's reply with its bytes decoded, also in lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [as_text(part) for part in value]
    return value


def micros(moment: datetime | None) -> str:
    """Microseconds since 1970; empty for none."""
    return "" if moment is None else str((moment - _EPOCH) // timedelta(microseconds=1))


def _time(micros: str | None) -> datetime | None:
    return _EPOCH + timedelta(microseconds=int(micros)) if micros else None


def write_cursor(score: str, task_id: str) -> str:
    """The cursor of a page whose last entry this is."""
    return f"{score}:{task_id}"


def read_cursor(cursor: str) -> tuple[str, str]:
    """The last entry of a page. Raises InvalidTask."""
    if not re.fullmatch(CURSOR_PATTERN, cursor):
        raise InvalidTask(
            f"{cursor[:100]!r} is not a cursor of a listing: pass the cursor of the previous page",
            code="bad_cursor",
        )
    score, _, task_id = cursor.partition(":")
    return score, task_id
