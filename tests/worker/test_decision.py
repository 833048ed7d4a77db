"""What to do next with a delivery, decided without a broker."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.broker import RETRY_LEVELS
from inferq.consumers.worker.decision import (
    MAX_DEFERRALS,
    MAX_DELIVERIES,
    MAX_ENGINE_DEATHS,
    MAX_ORPHANED_RUNS,
    MAX_WAITS,
    AlreadyDone,
    Cancel,
    DeadLetter,
    Defer,
    Expire,
    Facts,
    Retry,
    Run,
    WaitForOtherRun,
    WaitForSameWork,
    after_failure,
    after_unreadable,
    before_run,
)
from inferq.schemas import (
    ErrorInfo,
    InferqError,
    InvalidTask,
    Result,
    Task,
    TransientFailure,
    parse_task,
)

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
    assert isinstance(verdict, DeadLetter)
    assert verdict.error.code == "wrong_queue"
    assert "task_type.echo" in verdict.error.message


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_an_ended_task_is_skipped(status: str) -> None:
    result = ended(task(), status)
    assert decide(task(), ended=result) == AlreadyDone(result)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_redriven_task_runs_once_for_each_redrive(status: str) -> None:
    assert decide(task(), ended=ended(task(), status), redrives=1) == Run()
    again = ended(task(), status, redrives=1)
    assert decide(task(), ended=again, redrives=1) == AlreadyDone(again)
    assert decide(task(), ended=again, redrives=2) == Run()


@given(st.integers(0, 10), st.integers(0, 10))
def test_a_success_is_final_however_often_it_is_redriven(recorded: int, redrives: int) -> None:
    result = ended(task(), redrives=recorded)
    assert decide(task(), ended=result, redrives=redrives) == AlreadyDone(result)


def test_the_same_id_with_other_content_is_buried_and_leaves_the_record_alone() -> None:
    other = task(payload="other")
    for known in (
        {"ended": ended(other)},
        {"ended": ended(other, "failed")},
        {"recorded_digest": other.digest()},
    ):
        verdict = decide(task(), **known)
        assert isinstance(verdict, DeadLetter)
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


def test_a_task_whose_runs_vanish_is_given_up_before_it_is_run_once_too_often() -> None:
    assert decide(task(), orphaned_runs=MAX_ORPHANED_RUNS - 1, deliveries=MAX_ORPHANED_RUNS) == Run()
    verdict = decide(task(), orphaned_runs=MAX_ORPHANED_RUNS, deliveries=MAX_ORPHANED_RUNS)
    assert isinstance(verdict, DeadLetter)
    assert verdict.error.code == "poison"
    assert verdict.record


def test_the_runs_of_other_copies_are_not_held_against_a_copy_that_is_handed_out_for_the_first_time() -> None:
    assert decide(task(), orphaned_runs=50, deliveries=0) == Run()


def test_a_lost_run_tells_more_than_an_engines_death_and_less_than_a_delivery() -> None:
    assert MAX_ENGINE_DEATHS < MAX_ORPHANED_RUNS < MAX_DELIVERIES


def test_a_task_that_never_comes_to_an_end_is_given_up() -> None:
    assert decide(task(), deliveries=MAX_DELIVERIES - 1) == Run()
    verdict = decide(task(), deliveries=MAX_DELIVERIES)
    assert isinstance(verdict, DeadLetter)
    assert verdict.error.code == "poison"
    assert verdict.record
    done = ended(task())
    assert decide(task(), deliveries=MAX_DELIVERIES, ended=done) == AlreadyDone(done)


def test_a_copy_of_an_earlier_attempt_waits_longer_and_longer_for_the_later_one() -> None:
    waits = [decide(task(), past=True, waits=waits) for waits in range(MAX_WAITS)]
    assert waits == [WaitForOtherRun(RETRY_LEVELS[n], n + 1) for n in range(MAX_WAITS)]
    # The run in progress takes as long as it takes; the wait for the attempt after that one begins anew.
    assert decide(task(), past=True, waits=2, other_run="1 run") == WaitForOtherRun(RETRY_LEVELS[0])


def test_work_that_another_task_has_in_progress_is_waited_for_longer_once_it_takes_long() -> None:
    waits = [decide(task(), same_work=seconds) for seconds in (0.0, 29.9, 30.0, 7200.0)]
    assert waits == [WaitForSameWork(seconds) for seconds in (5, 5, 30, 30)]
    assert decide(task(), same_work=1.0, other_run="1 run") == WaitForOtherRun(RETRY_LEVELS[0])


def test_what_was_given_back_often_is_no_poison_where_the_runs_are_counted() -> None:
    own = task().digest()
    assert decide(task(), deliveries=1000, recorded_digest=own, orphaned_runs=0) == Run()
    assert is_poison(decide(task(), deliveries=1000, recorded_digest=own))
    assert is_poison(decide(task(), deliveries=1000, orphaned_runs=0))


attempts = st.integers(1, 50)


UNREADABLE = InvalidTask("options.colour: is unknown")


def test_an_unreadable_message_that_nobody_has_accepted_is_buried_at_once() -> None:
    assert after_unreadable(UNREADABLE, accepted=False, version=9, deferrals=0) == DeadLetter(UNREADABLE)


def test_a_task_that_only_another_version_can_read_waits_for_it_longer_and_longer() -> None:
    verdicts = [
        after_unreadable(UNREADABLE, accepted=True, version=9, deferrals=number)
        for number in range(MAX_DEFERRALS)
    ]
    waits = [verdict.seconds for verdict in verdicts if isinstance(verdict, Defer)]
    assert waits == [*RETRY_LEVELS, *[RETRY_LEVELS[-1]] * (MAX_DEFERRALS - len(RETRY_LEVELS))]


def test_a_task_that_no_worker_could_read_for_a_day_is_buried_and_can_be_redriven() -> None:
    verdict = after_unreadable(UNREADABLE, accepted=True, version=9, deferrals=MAX_DEFERRALS)
    assert isinstance(verdict, DeadLetter)
    assert verdict.error.code == "unsupported_version"
    assert "options.colour: is unknown" in verdict.error.message
    assert "version 9" in verdict.error.message
    assert ErrorInfo.of(verdict.error).retryable


@given(attempts, attempts, st.integers(0, 5), st.booleans())
def test_what_is_invalid_is_never_retried(attempt: int, most: int, deaths: int, died: bool) -> None:
    error = InvalidTask("no")
    verdict = after_failure(error, attempt=attempt, max_attempts=most, engine_deaths=deaths, engine_died=died)
    assert verdict == DeadLetter(error)


def test_a_missing_input_is_looked_for_twice() -> None:
    error = InvalidTask("there is no such object", code="input_not_found")
    verdicts = [
        after_failure(error, attempt=attempt, max_attempts=5, engine_deaths=0, engine_died=False)
        for attempt in (1, 2)
    ]
    assert verdicts == [Retry(RETRY_LEVELS[0], error, 0), DeadLetter(error)]
    once = after_failure(error, attempt=1, max_attempts=1, engine_deaths=0, engine_died=False)
    assert once == DeadLetter(error)


@given(attempts, attempts, st.integers(0, 5), st.booleans())
def test_a_transient_failure_is_retried_until_its_attempts_or_engines_are_used_up(
    attempt: int, most: int, deaths: int, died: bool
) -> None:
    error = TransientFailure("no")
    verdict = after_failure(error, attempt=attempt, max_attempts=most, engine_deaths=deaths, engine_died=died)
    if deaths + died >= MAX_ENGINE_DEATHS:
        assert isinstance(verdict, DeadLetter)
        assert verdict.error.code == "poison"
    elif attempt >= most:
        assert verdict == DeadLetter(error)
    else:
        assert isinstance(verdict, Retry)
        assert verdict.seconds in RETRY_LEVELS
        assert verdict.engine_deaths == deaths + died


# Every delivery that there can be: each fact on its own, in any combination.

_OWN = task().digest()
_OTHER = task(payload="other").digest()


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    expires = draw(st.sampled_from([None, NOW - timedelta(hours=1), NOW, NOW + timedelta(seconds=1)]))
    of = task() if expires is None else task(expires_at=expires.isoformat())
    # The digest does not depend on anything that the decision looks at: here it stands for the content.
    digests = st.sampled_from([_OWN, _OTHER, None])
    record = None
    if draw(st.booleans()):
        status = draw(st.sampled_from(["succeeded", "failed", "cancelled"]))
        record = ended(of, status, digest=draw(digests), redrives=draw(st.integers(0, 4)))
    return Facts(
        task=of,
        digest=_OWN,
        type_name=draw(st.sampled_from(["echo", "echo", "echo", "ocr"])),
        redrives=draw(st.integers(0, 4)),
        now=NOW,
        ended=record,
        recorded_digest=draw(digests),
        cancel_requested=draw(st.booleans()),
        orphaned_runs=draw(st.none() | st.integers(0, 2 * MAX_ORPHANED_RUNS)),
        deliveries=draw(st.integers(0, MAX_DELIVERIES + 5)),
        other_run=draw(st.sampled_from(["", "", "1 run"])),
        past=draw(st.booleans()),
        waits=draw(st.integers(0, MAX_WAITS)),
        same_work=draw(st.sampled_from([None, None, 0.5])),
    )


def owned(known: Facts) -> bool:
    """Whether the id is this task's own, and the queue the right one."""
    recorded = known.ended.digest if known.ended is not None else known.recorded_digest
    return known.type_name == "echo" and recorded in (None, known.digest)


def is_poison(verdict: object) -> bool:
    return isinstance(verdict, DeadLetter) and verdict.error.code == "poison"


@given(facts())
def test_the_same_facts_lead_to_the_same_decision(known: Facts) -> None:
    first, second = before_run(known), before_run(known)
    assert type(first) is type(second)
    assert isinstance(
        first, Run | AlreadyDone | WaitForOtherRun | WaitForSameWork | Cancel | Expire | DeadLetter
    )


@given(facts())
def test_every_refusal_says_why(known: Facts) -> None:
    verdict = before_run(known)
    if isinstance(verdict, DeadLetter | Expire):
        assert isinstance(verdict.error, InvalidTask)
        assert verdict.error.code in {"wrong_queue", "id_conflict", "expired", "poison"}
        assert len(verdict.error.message) > 30


@given(facts())
def test_a_success_is_skipped_whatever_else_is_known_and_never_run_again(known: Facts) -> None:
    if owned(known) and known.ended is not None and known.ended.digest and known.ended.status == "succeeded":
        assert before_run(known) == AlreadyDone(known.ended)


@given(facts())
def test_only_what_has_ended_is_skipped(known: Facts) -> None:
    verdict = before_run(known)
    if isinstance(verdict, AlreadyDone):
        assert verdict.ended is known.ended
        assert verdict.ended.digest == known.digest
        assert verdict.ended.status == "succeeded" or verdict.ended.redrives >= known.redrives


@given(facts())
def test_a_conflict_is_buried_and_touches_nobodys_record(known: Facts) -> None:
    recorded = known.ended.digest if known.ended is not None else known.recorded_digest
    verdict = before_run(known)
    if known.type_name == "echo" and recorded == _OTHER:
        assert isinstance(verdict, DeadLetter)
        assert (verdict.error.code, verdict.record) == ("id_conflict", False)
    else:
        assert not (isinstance(verdict, DeadLetter) and verdict.error.code == "id_conflict")


@given(facts())
def test_only_a_conflict_leaves_its_owner_without_a_record(known: Facts) -> None:
    verdict = before_run(known)
    if isinstance(verdict, DeadLetter) and not verdict.record:
        assert verdict.error.code == "id_conflict"


@given(facts())
def test_nothing_runs_that_is_cancelled_expired_poison_or_in_the_wrong_place(known: Facts) -> None:
    if before_run(known) == Run():
        assert owned(known)
        assert not known.cancel_requested
        assert not known.other_run
        assert not known.past
        assert known.task.expires_at is None or known.task.expires_at > NOW
        assert min(known.orphaned_runs or 0, known.deliveries) < MAX_ORPHANED_RUNS
        if known.orphaned_runs is None or known.recorded_digest is None:
            assert known.deliveries < MAX_DELIVERIES


@given(facts())
def test_what_nothing_speaks_against_runs(known: Facts) -> None:
    clean = replace(
        known, type_name="echo", ended=None, recorded_digest=None, cancel_requested=False, orphaned_runs=0,
        deliveries=0, task=task(), other_run="", past=False, same_work=None,
    )  # fmt: skip
    assert before_run(clean) == Run()


@given(facts(), st.integers(0, 50), st.integers(0, 50))
def test_more_lost_runs_or_deliveries_never_make_a_poison_task_run(
    known: Facts, orphaned_runs: int, deliveries: int
) -> None:
    more = None if known.orphaned_runs is None else known.orphaned_runs + orphaned_runs
    worse = replace(known, orphaned_runs=more, deliveries=known.deliveries + deliveries)
    before, after = before_run(known), before_run(worse)
    if before == Run():
        assert after == Run() or is_poison(after)
    elif is_poison(before):
        assert is_poison(after)
    else:  # what is decided for another reason does not depend on the counts
        assert type(before) is type(after)
        assert not is_poison(after)


@given(facts())
def test_a_cancel_is_heeded_unless_the_task_has_ended_or_is_not_the_one_meant(known: Facts) -> None:
    asked = replace(known, cancel_requested=True)
    verdict = before_run(asked)
    if isinstance(
        before_run(replace(known, cancel_requested=False)), Run | Expire | WaitForSameWork
    ) or is_poison(before_run(replace(known, cancel_requested=False))):
        assert verdict == Cancel()
    else:
        assert isinstance(verdict, AlreadyDone | DeadLetter | WaitForOtherRun)


@given(facts())
def test_a_copy_waits_for_a_run_in_progress_unless_the_task_has_ended_or_is_another(known: Facts) -> None:
    verdict = before_run(replace(known, other_run="1 run"))
    without = before_run(replace(known, other_run="", past=False))
    settled = isinstance(without, AlreadyDone) or (isinstance(without, DeadLetter) and not is_poison(without))
    assert type(verdict) is (type(without) if settled else WaitForOtherRun)
    assert not isinstance(without, WaitForOtherRun)


@given(facts(), st.integers(5, 9))
def test_a_redrive_gives_a_failed_task_another_chance(known: Facts, redrives: int) -> None:
    redriven = replace(
        known, redrives=redrives, orphaned_runs=0, deliveries=0, other_run="", past=False, same_work=None
    )
    if owned(known) and known.ended is not None and known.ended.status != "succeeded":
        assert isinstance(before_run(redriven), Run | Cancel | Expire)


failures = st.sampled_from(
    [
        InvalidTask("no"),
        TransientFailure("no"),
        TransientFailure("no", code="out_of_memory"),
        InferqError("no"),
    ]
)


@given(failures, attempts, attempts, st.integers(0, 5), st.booleans())
def test_a_failed_attempt_is_retried_or_buried_and_never_beyond_its_limit(
    error: InferqError, attempt: int, most: int, deaths: int, died: bool
) -> None:
    verdict = after_failure(error, attempt=attempt, max_attempts=most, engine_deaths=deaths, engine_died=died)
    match verdict:
        case Retry():
            assert attempt < most
            assert verdict.error is error
            assert not isinstance(error, InvalidTask)
            assert deaths <= verdict.engine_deaths < MAX_ENGINE_DEATHS
        case DeadLetter():
            assert verdict.record
            assert verdict.error is error or verdict.error.code == "poison"


@given(attempts, attempts, st.integers(MAX_ENGINE_DEATHS - 1, 9))
def test_poison_comes_before_retries_and_before_the_last_attempt(
    attempt: int, most: int, deaths: int
) -> None:
    error = TransientFailure("no")
    verdict = after_failure(error, attempt=attempt, max_attempts=most, engine_deaths=deaths, engine_died=True)
    assert is_poison(verdict)


@given(st.integers(1, 12), st.lists(st.booleans(), min_size=60, max_size=60))
def test_a_task_that_always_fails_ends_after_its_attempts_or_its_engines(most: int, died: list[bool]) -> None:
    deaths, runs = 0, 0
    for attempt, engine_died in enumerate(died, 1):
        runs += 1
        verdict = after_failure(
            TransientFailure("no"),
            attempt=attempt,
            max_attempts=most,
            engine_deaths=deaths,
            engine_died=engine_died,
        )
        if isinstance(verdict, DeadLetter):
            break
        assert verdict.engine_deaths == deaths + engine_died
        deaths = verdict.engine_deaths
    assert runs <= most
    assert sum(died[:runs]) <= MAX_ENGINE_DEATHS
    assert runs == most or sum(died[:runs]) == MAX_ENGINE_DEATHS
