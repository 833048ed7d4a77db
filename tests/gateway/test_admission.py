"""Whether to publish a submitted task, decided without Redis, the object store or the broker."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.producer.gateway.admission import (
    AlreadyAccepted,
    Facts,
    Publish,
    Refuse,
    UnusableInput,
    admit,
    may_be_in_use,
)
from inferq.schemas import EndState, InvalidTask, Result, State, TaskStatus, new_task_id, parse_task
from inferq.storage.objects.store import ObjectNotFound
from inferq.storage.status.index import Submission

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
TASK = parse_task({"task_id": "t1", "task_type": "echo", "tenant": "acme", "priority": "low"})
DIGEST = TASK.digest()


def record(
    *, new: bool, confirmed: bool = False, conflict: bool = False, state: State = "queued"
) -> Submission:
    status = TaskStatus(task_id="t1", task_type="echo", tenant="acme", state=state, worker="of the record")
    return Submission(new=new, confirmed=confirmed, conflict=conflict, status=status)


def result(digest: str | None, status: EndState = "succeeded") -> Result:
    return Result(
        task_id="t1",
        task_type="echo",
        tenant="acme",
        status=status,
        attempts=1,
        finished_at=NOW,
        digest=digest,
    )


def unusable(field: str, *, malformed: bool) -> UnusableInput:
    url = f"inferq:{field}"
    error = InvalidTask("malformed", code="bad_input_url") if malformed else ObjectNotFound("missing")
    return UnusableInput(field, url, error)


# What the status index answers: an id that is new or repeated, or one that another task has.
RECORDS = [
    record(new=True),
    record(new=True, confirmed=True),
    record(new=False),
    record(new=False, confirmed=True),
    record(new=False, confirmed=True, state="running"),
    record(new=False, confirmed=True, conflict=True),
    record(new=False, conflict=True),
]

facts = st.builds(
    Facts,
    task=st.just(TASK),
    digest=st.just(DIGEST),
    record=st.none() | st.sampled_from(RECORDS),
    accepted=st.sampled_from([None, DIGEST, "other"]),
    result=st.none()
    | st.builds(
        result,
        st.sampled_from([None, DIGEST, "other"]),
        st.sampled_from(["succeeded", "failed", "cancelled"]),
    ),
    is_queued_line=st.booleans(),
    unusable_inputs=st.lists(
        st.builds(unusable, st.sampled_from(["image_url", "text_url"]), malformed=st.booleans()), max_size=3
    ).map(tuple),
)


def answer(known: Facts) -> tuple[object, ...]:
    """The decision in a form that compares by value."""
    decision = admit(known)
    if isinstance(decision, Refuse):
        problem = decision.problem
        return Refuse, problem.status, problem.code, problem.message
    return type(decision), decision.status


def belongs_to_another(known: Facts) -> bool:
    if known.record is not None and known.record.conflict:
        return True
    if known.record_decides:
        return False
    ended = known.result.digest if known.result is not None else None
    known_digest = ended or accepted_meanwhile(known)
    return known_digest not in (None, DIGEST) or (known_digest is None and known.is_queued_line)


def accepted_meanwhile(known: Facts) -> str | None:
    return known.accepted if known.record is None else None


@given(facts)
def test_a_task_is_published_if_no_fact_speaks_against_it(known: Facts) -> None:
    ended = known.result is not None and known.result.digest is not None
    in_use = known.record_decides or ended or accepted_meanwhile(known) or known.is_queued_line
    free = not (in_use or known.unusable_inputs)
    assert isinstance(admit(known), Publish) == free


@given(facts)
def test_an_id_of_another_task_is_a_conflict(known: Facts) -> None:
    decision = admit(known)
    refused_so = isinstance(decision, Refuse) and decision.problem.code == "id_conflict"
    assert refused_so == belongs_to_another(known)
    if isinstance(decision, Refuse) and refused_so:
        assert decision.problem.status == 409
        assert decision.problem.extensions == {"task_id": "t1"}


@given(facts)
def test_an_accepted_task_is_answered_with_its_status(known: Facts) -> None:
    decision = admit(known)
    if isinstance(decision, AlreadyAccepted):
        assert not belongs_to_another(known)
        if known.record_decides:
            assert known.record is not None
            assert decision.status == known.record.status
        elif known.result is not None and known.result.digest is not None:
            assert decision.status == TaskStatus.of_result(known.result)
        else:
            assert accepted_meanwhile(known) == DIGEST
            assert decision.status.state == "queued"


@given(facts)
def test_a_record_that_decides_outweighs_every_other_fact(known: Facts) -> None:
    if known.record_decides:
        assert answer(known) == answer(Facts(TASK, DIGEST, record=known.record))


@given(facts)
def test_the_result_of_an_unreadable_message_counts_for_nothing(known: Facts) -> None:
    assert answer(replace(known, result=result(None))) == answer(replace(known, result=None))


@given(facts)
def test_only_an_id_that_is_free_is_refused_for_its_inputs(known: Facts) -> None:
    decision = admit(known)
    if isinstance(decision, Refuse) and decision.problem.code != "id_conflict":
        first = known.unusable_inputs[0]
        malformed = isinstance(first.error, InvalidTask)
        assert decision.problem.status == 422
        assert decision.problem.code == ("bad_input_url" if malformed else "unknown_file")
        if not malformed:
            assert decision.problem.errors is not None
            assert [fault.field for fault in decision.problem.errors] == [first.field]
        assert isinstance(admit(replace(known, unusable_inputs=())), Publish)


def test_an_unconfirmed_record_is_published_again_under_its_status() -> None:
    unconfirmed = record(new=False)
    assert admit(Facts(TASK, DIGEST, record=unconfirmed)) == Publish(unconfirmed.status)


def test_without_redis_the_answer_is_a_queued_task() -> None:
    decision = admit(Facts(TASK, DIGEST))
    assert isinstance(decision, Publish)
    status = decision.status
    assert (status.task_id, status.tenant, status.state, status.priority) == ("t1", "acme", "queued", "low")


@pytest.mark.parametrize(("minutes", "expected"), [(0, False), (58, False), (62, True), (-62, True)])
def test_an_id_made_within_the_hour_is_free(minutes: int, expected: bool) -> None:
    assert may_be_in_use(new_task_id(), datetime.now(UTC) + timedelta(minutes=minutes)) is expected


@pytest.mark.parametrize("task_id", ["chosen", "f47ac10b-58cc-4372-a567-0e02b2c3d479"])
def test_an_id_without_a_time_may_be_in_use(task_id: str) -> None:
    assert may_be_in_use(task_id, datetime.now(UTC))
