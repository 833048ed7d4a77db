"""What one part writes and another one reads, where the two are of different versions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from inferq.schemas import (
    SCHEMA_VERSION,
    BatchEvent,
    BatchStatus,
    BatchSummary,
    Callback,
    CallbackRecord,
    Event,
    NightEvent,
    Record,
    Result,
    TaskStatus,
)
from inferq.schemas.encoding import result_json, to_json
from inferq.schemas.schedule import Schedule

NOW = "2026-05-01T12:00:00Z"
TASK = {"task_id": "t", "task_type": "echo", "tenant": "default"}
ERROR = {"code": "never", "message": "it will not do", "retryable": False}
SUMMARY = {
    "batch_id": "b", "tenant": "default", "state": "completed", "counts": {"total": 1, "succeeded": 1},
    "seconds": 1.0, "tasks_per_second": 1.0, "created_at": NOW, "finished_at": NOW,
}  # fmt: skip
CALLBACK = {
    "callback_id": "msg_" + "0" * 32, "tenant": "default", "subject_kind": "task", "subject_id": "t",
    "event": "task.failed", "url": "https://example.com/h",
}  # fmt: skip
NIGHT = {
    "run_id": "n-20260501T000000Z", "schedule": "n", "tenant": "default", "night": "2026-05-01",
    "state": "completed", "began": NOW, "until": NOW, "seconds": 1.0, "tasks_per_second": 0.0,
}  # fmt: skip
RECORDS: list[tuple[type[Record], dict[str, Any]]] = [
    (Result, TASK | {"status": "failed", "attempts": 1, "error": ERROR, "finished_at": NOW}),
    (TaskStatus, TASK | {"state": "failed", "error": ERROR}),
    (Event, {"type": "task.failed", "timestamp": NOW, "data": TASK | {"state": "failed", "error": ERROR}}),
    (Callback, CALLBACK | {"body": "{}"}),
    (CallbackRecord, CALLBACK | {"state": "failed", "attempts": [{"at": NOW, "seconds": 1}], "updated_at": NOW}),
    (BatchSummary, SUMMARY),
    (BatchEvent, {"type": "batch.completed", "timestamp": NOW, "data": SUMMARY}),
    (BatchStatus, TASK | {"batch_id": "b", "state": "feeding", "source": "s3://b/k.jsonl", "created_at": NOW}),
    (NightEvent, {"type": "nightly.summary", "timestamp": NOW, "data": NIGHT}),
    (Schedule, {"name": "n", "cron": "0 2 * * *", "source": "s3://b/pages"}),
]  # fmt: skip


def with_news(value: Any) -> Any:
    """The JSON value with a field that this version does not know in each of its records."""
    match value:
        case dict():
            return {**{name: with_news(part) for name, part in value.items()}, "from_a_later_version": [1]}
        case list():
            return [with_news(part) for part in value]
    return value


def contains(whole: Any, part: Any) -> bool:
    match whole, part:
        case dict(), dict():
            return all(name in whole and contains(whole[name], value) for name, value in part.items())
        case list(), list():
            return len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


@pytest.mark.parametrize(("model", "record"), RECORDS)
def test_fields_of_a_later_version_are_kept_when_a_record_is_written_again(
    model: type[Record], record: dict[str, Any]
) -> None:
    newer = with_news(record)
    again = json.loads(to_json(model.model_validate_json(json.dumps(newer))))
    assert contains(again, newer)


def test_a_result_keeps_them_beside_an_output_that_is_text() -> None:
    result = Result.model_validate(RECORDS[0][1] | {"status": "succeeded", "news": {"output": None}})
    written = json.loads(result_json(result, b'{"payload":"x"}'))
    assert (written["output"], written["news"]) == ({"payload": "x"}, {"output": None})


@pytest.mark.parametrize("model", [Result, Event, BatchEvent, NightEvent])
def test_a_record_without_a_version_is_of_the_first_and_a_later_one_stays(model: type[Record]) -> None:
    record = dict(RECORDS)[model]
    assert json.loads(to_json(model.model_validate(record)))["version"] == SCHEMA_VERSION == 1
    assert json.loads(to_json(model.model_validate(record | {"version": 7})))["version"] == 7


def test_a_schedule_of_a_user_is_read_strictly() -> None:
    with pytest.raises(ValidationError, match="colour"):
        Schedule.model_validate(dict(RECORDS)[Schedule] | {"colour": "red"}, extra="forbid")
