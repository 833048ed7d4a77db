"""What to do next with a delivery, decided without a broker."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import RETRY_LEVELS
from consumers.decision import (
    MAX_DELIVERIES,
    MAX_ENGINE_DEATHS,
    Bury,
    Cancel,
    Expire,
    Facts,
    Retry,
    Run,
    Skip,
    after_failure,
    before_run,
)
from schemas import InvalidTask, Result, Task, TransientFailure, parse_task

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def task(**fields: object) -> Task:
    return parse_task({"task_id": "t1", "task_type": "echo", **fields})


def ended(of: Task, status: str = "succeeded", **fields: object) -> Result:
    record = {
        "task_id": of.task_id, "task_type": of.task_type, "tenant": of.tenant, "status": status,
        "attempts": 1, "finished_at": NOW, "digest": of.digest(), **fields,
    }  # fmt: skip
    return Result.model_validate(record)


def decide(of: Task, **known: object) -> object:
    return before_run(
        Facts(**{"task": of, "digest": of.digest(), "type_name": "echo", "redrives": 0, "now": NOW, **known})
    )  # type: ignore[arg-type]


def test_a_new_task_runs() -> None:
    assert decide(task()) == Run()
    assert decide(task(), recorded_digest=task().digest()) == Run()


def test_a_task_on_another_types_queue_is_buried_with_advice() -> None:
    verdict = decide(task(), type_name="ocr")
    assert isinstance(verdict, Bury)
    assert verdict.error.code == "wrong_queue"
    assert "task_type.echo" in verdict.error.message


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_an_ended_task_is_skipped(status: str) -> None:
    result = ended(task(), status)
    assert decide(task(), ended=result) == Skip(result)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_redriven_task_runs_once_for_each_redrive(status: str) -> None:
    assert decide(task(), ended=ended(task(), status), redrives=1) == Run()
    again = ended(task(), status, redrives=1)
    assert decide(task(), ended=again, redrives=1) == Skip(again)
    assert decide(task(), ended=again, redrives=2) == Run()


@given(st.integers(0, 10), st.integers(0, 10))
def test_a_success_is_final_however_often_it_is_redriven(recorded: int, redrives: int) -> None:
    result = ended(task(), redrives=recorded)
    assert decide(task(), ended=result, redrives=redrives) == Skip(result)


def test_the_same_id_with_other_content_is_buried_and_leaves_the_record_alone() -> None:
    other = task(payload="other")
    for known in (
        {"ended": ended(other)},
        {"ended": ended(other, "failed")},
        {"recorded_digest": other.digest()},
    ):
        verdict = decide(task(), **known)
        assert isinstance(verdict, Bury)
        assert verdict.error.code == "id_conflict"
        assert not verdict.record


def test_a_failure_of_an_unreadable_message_does_not_speak_for_the_task() -> None:
    assert decide(task(), ended=ended(task(), "failed", digest=None)) == Run()


def test_cancelled_and_expired_tasks_never_start() -> None:
    assert decide(task(), cancel_requested=True) == Cancel()
    late = task(expires_at=(NOW - timedelta(seconds=1)).isoformat())
    verdict = decide(late)
    assert isinstance(verdict, Expire)
    assert verdict.error.code == "expired"
    assert decide(task(expires_at=(NOW + timedelta(seconds=1)).isoformat())) == Run()


def test_defaults_and_the_stamp_of_a_gateway_do_not_make_another_task() -> None:
    spelled = task(priority="normal", tenant="default", delay=0.0, created_at=NOW.isoformat(), metadata={})
    assert spelled.digest() == task().digest()
    assert task(priority="high").digest() != task().digest()


def test_a_task_that_never_comes_to_an_end_is_given_up() -> None:
    assert decide(task(), deliveries=MAX_DELIVERIES - 1) == Run()
    verdict = decide(task(), deliveries=MAX_DELIVERIES)
    assert isinstance(verdict, Bury)
    assert verdict.error.code == "poison"
    assert verdict.record
    done = ended(task())
    assert decide(task(), deliveries=MAX_DELIVERIES, ended=done) == Skip(done)


attempts = st.integers(1, 50)


@given(attempts, attempts, st.integers(0, 5), st.booleans())
def test_what_is_invalid_is_never_retried(attempt: int, most: int, deaths: int, died: bool) -> None:
    error = InvalidTask("no")
    verdict = after_failure(error, attempt=attempt, max_attempts=most, engine_deaths=deaths, engine_died=died)
    assert verdict == Bury(error)


@given(attempts, attempts, st.integers(0, 5), st.booleans())
def test_a_transient_failure_is_retried_until_its_attempts_or_engines_are_used_up(
    attempt: int, most: int, deaths: int, died: bool
) -> None:
    error = TransientFailure("no")
    verdict = after_failure(error, attempt=attempt, max_attempts=most, engine_deaths=deaths, engine_died=died)
    if deaths + died >= MAX_ENGINE_DEATHS:
        assert isinstance(verdict, Bury)
        assert verdict.error.code == "poison"
    elif attempt >= most:
        assert verdict == Bury(error)
    else:
        assert isinstance(verdict, Retry)
        assert verdict.seconds in RETRY_LEVELS
        assert verdict.engine_deaths == deaths + died
