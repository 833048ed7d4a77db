"""Callbacks: their ids, their size, and the order of what they tell."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inferq.broker import callback_message
from inferq.consumers.nightly.night import Ended, last_night, night_callback, paused_night
from inferq.schemas import (
    MAX_CALLBACK_BYTES,
    Artifact,
    Batch,
    BatchCounts,
    BatchSummary,
    Callback,
    ErrorInfo,
    Event,
    Night,
    Result,
    batch_callback,
    end_callback,
    installed_types,
    sequence_of,
    task_callback,
)
from inferq.schemas.publish import asyncapi, documents
from inferq.schemas.result import OUTPUT_ARTIFACT
from inferq.schemas.schedule import Schedule
from inferq.storage.nightly_runs import Run

ENDED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
URL = "https://example.com/hook"


def ended(**fields: Any) -> Result:
    given: dict[str, Any] = {
        "task_id": "t1",
        "task_type": "echo",
        "tenant": "acme",
        "status": "succeeded",
        "attempts": 1,
        "finished_at": ENDED,
        "digest": "d" * 64,
    }
    return Result(**(given | fields))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    output=json_values,
    metadata=st.dictionaries(st.text(), json_values, max_size=3),
    scale=st.sampled_from([1, 3_000, 30_000]),
    message=st.text(max_size=40),
)
def test_a_body_is_small_and_json_whatever_the_task_holds(
    output: Any, metadata: dict[str, Any], scale: int, message: str
) -> None:
    result = ended(
        status="failed",
        output=[output, "x\x01界" * scale],
        metadata={**metadata, "m": "界" * scale},
        error=ErrorInfo(code="c" * scale, message=message * 100 + "\x01" * min(scale, 4000), retryable=False),
    )
    body = task_callback(Event.of_result(result), URL).body
    assert len(body.encode()) < MAX_CALLBACK_BYTES
    data = json.loads(body)["data"]
    assert ("output" in data["truncated"]) == (data["output"] is None)
    assert ("metadata" in data["truncated"]) == (data["metadata"] == {})
    assert ("error" in data["truncated"]) == (
        data["error"]["code"] != "c" * scale
        or len(data["error"]["message"]) < len(result.error.message if result.error else "")
    )


def test_an_output_that_is_an_artifact_is_said_to_be_left_out() -> None:
    artifact = Artifact(
        name=OUTPUT_ARTIFACT, url="/o", content_type="application/json", bytes=300_000, sha256="0" * 64
    )
    data = Event.of_result(ended(artifacts=(artifact,))).data
    assert (data.output, data.truncated) == (None, ("output",))
    assert Event.of_result(ended(output=None)).data.truncated == ()


def test_the_output_goes_before_the_metadata() -> None:
    result = ended(output="o" * 8_000, metadata={"m": "m" * 13_000})
    data = json.loads(task_callback(Event.of_result(result), URL).body)["data"]
    assert (data["output"], data["truncated"]) == (None, ["output"])
    assert data["metadata"] == result.metadata


def test_the_same_end_has_the_same_id_and_the_same_bytes() -> None:
    one, other = (task_callback(Event.of_result(ended(output={"a": 1})), URL, 0, "d") for _ in range(2))
    assert one == other
    assert callback_message(one).message_id == one.callback_id


@pytest.mark.parametrize("parts", [(1, "d"), (0, "e"), (0,), ()])
def test_another_redrive_or_task_has_another_id(parts: tuple[int | str, ...]) -> None:
    event = Event.of_result(ended())
    assert task_callback(event, URL, *parts).callback_id != task_callback(event, URL, 0, "d").callback_id


@pytest.mark.parametrize(
    "change", [{"redrives": 1}, {"digest": None}, {"tenant": "other"}, {"task_id": "t2"}]
)
def test_another_end_has_another_id(change: dict[str, Any]) -> None:
    one, other = (end_callback(result, URL) for result in (ended(), ended(**change)))
    assert one.callback_id != other.callback_id


@given(
    redrives=st.integers(0, 2_000),
    attempt=st.integers(1, 998),
    later=st.integers(1, 5),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_what_happens_later_has_the_larger_number(
    redrives: int, attempt: int, later: int, fractions: tuple[float, float]
) -> None:
    low, high = sorted(fractions)

    def number(
        state: Any, attempt: int = attempt, redrives: int = redrives, progress: float | None = None
    ) -> int:
        return sequence_of(state, attempt=attempt, redrives=redrives, progress=progress)

    assert number("queued") < number("running") < number("running", progress=low)
    assert number("running", progress=low) <= number("running", progress=high)
    assert number("running", progress=high) < number("retrying") < number("succeeded")
    following = min(attempt + later, 998)
    if following > attempt:
        assert number("retrying") < number("running", attempt=following) < number("failed", attempt=following)
    assert number("failed", attempt=1200) < number("succeeded")
    assert number("failed") < number("queued", attempt=1, redrives=redrives + 1)
    # It takes the place of a failure of whatever redrive: that of a copy which went on meanwhile.
    assert number("failed", redrives=redrives + later) < number("succeeded") < 2**53


@pytest.mark.parametrize(
    "change",
    [
        {"callback_id": "msg_1"},
        {"url": "ftp://example.com"},
        {"subject_kind": "file"},
        {"event": "done"},
        {"tenant": "a/b"},
        {"body": "x" * MAX_CALLBACK_BYTES},
    ],
)
def test_what_is_no_callback_is_refused(change: dict[str, str]) -> None:
    good = task_callback(Event.of_result(ended()), URL).model_dump()
    with pytest.raises(ValidationError):
        Callback(**(good | change))


def test_an_end_after_retries_sorts_last() -> None:
    result = ended(attempts=3, finished_at=ENDED + timedelta(hours=1))
    assert Event.of_result(result).data.sequence > sequence_of("retrying", attempt=2, redrives=0)


def summary(**fields: Any) -> BatchSummary:
    given: dict[str, Any] = {
        "batch_id": "b1", "tenant": "acme", "state": "completed", "counts": BatchCounts(total=2, succeeded=2),
        "seconds": 4.0, "tasks_per_second": 0.5, "created_at": ENDED, "finished_at": ENDED,
    }  # fmt: skip
    return BatchSummary(**(given | fields))


@given(
    schedule=st.none() | st.text(),
    error=st.none() | st.text(),
    metadata=st.dictionaries(st.text(), json_values, max_size=3),
    code=st.text(),
    scale=st.sampled_from([1, 30_000]),
)
def test_a_body_is_small_whatever_the_batch_holds(
    schedule: str | None, error: str | None, metadata: dict[str, Any], code: str, scale: int
) -> None:
    ended = summary(
        state="failed", schedule=schedule and schedule * scale, error=error and error * scale,
        metadata={**metadata, "m": "界" * scale}, failures={code * scale: 1},
    )  # fmt: skip
    body = batch_callback(ended, URL).body
    assert len(body.encode()) < MAX_CALLBACK_BYTES
    data = json.loads(body)["data"]
    assert (data["metadata"] == ended.metadata) == ("metadata" not in data.get("truncated", ()))
    assert (data["failures"] == ended.failures) == ("failures" not in data.get("truncated", ()))


def test_a_long_error_is_cut_and_nothing_left_out_for_it() -> None:
    data = json.loads(
        batch_callback(summary(state="failed", error="e" * 30_000, metadata={"m": 1}), URL).body
    )["data"]
    assert (len(data["error"]), data["metadata"], data.get("truncated")) == (1000, {"m": 1}, None)


@pytest.mark.parametrize("name", ["s" * 65, "a b", "a/b", ""])
def test_what_no_schedule_is_named_is_no_batchs_schedule(name: str) -> None:
    with pytest.raises(ValidationError):
        Batch(batch_id="b", source="inferq:x", schedule=name, created_at=ENDED)


def nights() -> list[Night]:
    """One that its window ended, and the last."""
    said = {"name": "scans", "cron": "0 1 * * *", "source": "s3://scans/in/", "task_type": "ocr"}
    run = Run(run_id="scans-1", scheduled_at=ENDED, schedule=Schedule.model_validate(said))
    ends = [Ended("succeeded", None, 3), Ended("failed", "not_an_image")]
    paused = paused_night(run, date(2026, 1, 1), ENDED, ENDED, None, ends)
    return [paused, last_night(run, date(2026, 1, 2), summary(state="failed", error="gone"), [paused])]


CALLBACKS = {
    "event": [end_callback(ended(), URL), end_callback(ended(output="o" * MAX_CALLBACK_BYTES), URL)],
    "batch_event": [
        batch_callback(summary(), URL),
        batch_callback(summary(state="cancelled", pages=3, pages_per_second=0.7, schedule="scans"), URL),
        batch_callback(summary(state="failed", error="e" * 2000, failures={"gone": 1}), URL),
        batch_callback(
            summary(metadata={"m": "m" * MAX_CALLBACK_BYTES}, failures={"f" * MAX_CALLBACK_BYTES: 1}), URL
        ),
    ],
    "night_event": [night_callback(night, URL) for night in nights()],
}


def strict(schema: Any) -> Any:
    """The schema, with nothing allowed that it does not name."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: strict(part) for name, part in schema.items()}
    return {**parts, "additionalProperties": False} if "properties" in schema else parts


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_is_sent_is_what_is_published_of_its_kind_and_of_no_other(name: str) -> None:
    file = f"{name.replace('_', '-')}.schema.json"
    document = asyncapi(installed_types())
    payload = document["components"]["messages"][name]["payload"]
    assert name in document["channels"]["callbacks"]["messages"]
    for schema in (
        json.loads(documents(installed_types())[file]),
        {**payload, "components": document["components"]},
    ):
        validator = jsonschema.Draft202012Validator(strict(schema))
        for kind, callbacks in CALLBACKS.items():
            for callback in callbacks:
                faults = list(validator.iter_errors(json.loads(callback.body)))
                assert (not faults) == (kind == name), faults
