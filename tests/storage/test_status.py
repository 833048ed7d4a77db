"""The status index: every change once, and never backwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.schemas import (
    END_STATES,
    EndState,
    ErrorInfo,
    Event,
    TaskStatus,
)
from inferq.storage import StatusIndex
from inferq.storage.status.keys import record_key
from tests.runs import begin_run
from tests.storage.conftest import RedisServer
from tests.storage.tasks import ERROR, NOW, Race, begin, end, job, known
from tests.waiting import eventually


def test_a_task_goes_its_way_and_says_so(index: StatusIndex, events: Callable[[], list[Event]]) -> None:
    task = job(tenant="acme", priority="high", batch_id="b1", metadata={"k": 1}, created_at=NOW)
    submission = index.submit(task)
    assert (submission.new, submission.confirmed, submission.conflict) == (True, False, False)
    assert submission.status == TaskStatus(
        task_id="t1",
        task_type="job",
        tenant="acme",
        state="queued",
        priority="high",
        batch_id="b1",
        created_at=NOW,
    )
    assert events() == []
    index.confirm(task)
    begun = begin(index, task)
    assert (begun.cancel_requested, begun.digest, begun.state) == (False, task.digest(), "running")
    index.progress("acme", "t1", 0.25, "reading 名前")
    status = known(index, task)
    assert (status.state, status.progress, status.progress_note, status.worker) == (
        "running", 0.25, "reading 名前", "w1",
    )  # fmt: skip
    index.retrying(task, attempt=1, redrives=0, error=ERROR)
    assert known(index, task).error == ERROR
    begin(index, task, attempt=2, worker="w2")
    assert index.ended(end(task, attempts=2, worker="w2", started_at=NOW, output={"n": 1}, metadata={"k": 1}))
    status = known(index, task)
    assert (status.state, status.attempt, status.error, status.progress) == ("succeeded", 2, None, 1.0)
    assert status.started_at == NOW
    assert status.created_at == NOW
    found = events()
    assert [event.type for event in found] == [
        "task.queued", "task.started", "task.progress", "task.retrying", "task.started", "task.succeeded",
    ]  # fmt: skip
    assert {(e.data.task_type, e.data.batch_id) for e in found} == {("job", "b1")}
    assert [event.data.attempt for event in found] == [1, 1, 1, 1, 2, 2]
    assert (found[2].data.progress, found[2].data.note) == (0.25, "reading 名前")
    assert found[3].data.error == ERROR
    assert found[5].data.output == {"n": 1}
    assert all(event.data.metadata == {"k": 1} for event in found if event.type != "task.progress")


def test_fields_of_a_later_version_stay_in_the_record(index: StatusIndex, redis_client: redis.Redis) -> None:
    task = job()
    index.submit(task)
    redis_client.hset(record_key("default", task.task_id), "later", "1")
    index.confirm(task)
    begin(index, task)
    assert known(index, task).state == "running"
    assert redis_client.hget(record_key("default", task.task_id), "later") == "1"


def test_the_digest_that_a_task_came_with_is_the_one_on_record(index: StatusIndex) -> None:
    task, digest = job(), "d" * 64
    error = ErrorInfo(code="x", message="x", retryable=True)
    index.retrying(task, attempt=1, redrives=0, error=error, digest=digest)
    now = datetime.now(UTC)
    begun = index.begin_pipelined(
        task, attempt=2, redrives=0, worker="w", started_at=now, digest=digest, run="r"
    )()
    assert begun.digest == digest
    assert known(index, task).state == "running"


def test_nothing_is_known_of_an_unknown_task(index: StatusIndex) -> None:
    assert index.get("default", "t1") is None
    assert index.request_cancel("default", "t1") is None
    assert index.cancel_requested("default", "t1") is False
    index.progress("default", "t1", 0.5, None)
    index.forget(job())
    assert index.get("default", "t1") is None
    assert index.list("default").items == ()


def test_the_same_task_is_submitted_once(index: StatusIndex, events: Callable[[], list[Event]]) -> None:
    task = job()
    assert index.submit(task).new
    again = index.submit(job(created_at=NOW))
    assert (again.new, again.confirmed, again.conflict) == (False, False, False)
    index.confirm(task)
    index.confirm(task)
    assert index.submit(task).confirmed
    assert [event.type for event in events()] == ["task.queued"]


def test_another_task_of_the_same_id_is_a_conflict_and_changes_nothing(
    index: StatusIndex, events: Callable[[], list[Event]]
) -> None:
    task, other = job(), job(text="other")
    index.submit(task)
    submission = index.submit(other)
    assert (submission.new, submission.conflict) == (False, True)
    assert index.confirm(other) is False
    assert index.confirm(task) is True
    before = known(index, task)
    index.forget(other)
    assert begin(index, other).digest == task.digest()
    index.retrying(other, attempt=1, redrives=0, error=ERROR)
    assert index.ended(end(other, "failed")) is False
    assert index.ended(end(other)) is False
    assert known(index, task) == before
    assert [event.type for event in events()] == ["task.queued"]
    assert index.submit(other).conflict


def test_what_was_never_accepted_gives_way_to_a_task_in_a_workers_hands(index: StatusIndex) -> None:
    """It came by AMQP, or Redis had forgotten it: that is the one that was promised to be done."""
    task, refused = job(), job(text="refused")
    index.submit(refused)
    assert begin(index, task).digest is None
    assert known(index, task).state == "running"
    assert index.confirm(refused) is False
    index.forget(refused)
    assert index.ended(end(task)) is True
    assert known(index, task).state == "succeeded"


def test_of_racing_submissions_one_is_new(index: StatusIndex, race: Race) -> None:
    found = race(16, lambda n: index.submit(job()).new)
    assert sorted(map(str, found)) == ["False"] * 15 + ["True"]


def test_forgetting_undoes_only_what_nobody_has_touched(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    task = job(batch_id="b")
    index.submit(task)
    index.forget(task)
    assert index.get("default", "t1") is None
    assert redis_client.keys("*") == []
    assert index.submit(task).new
    index.confirm(task)
    index.forget(task)
    assert known(index, task).state == "queued"
    picked = job("t2")
    index.submit(picked)
    begin(index, picked)
    index.forget(picked)
    assert known(index, picked).state == "running"


def test_a_confirmation_after_anothers_forgetting_still_counts(index: StatusIndex) -> None:
    task = job()
    index.submit(task)
    index.submit(task)
    index.forget(task)
    index.confirm(task)
    assert index.submit(task).confirmed
    assert index.list("default", state="queued").items == (known(index, task),)


def test_a_worker_that_is_faster_than_the_confirmation_wins(
    index: StatusIndex, events: Callable[[], list[Event]]
) -> None:
    task = job()
    index.submit(task)
    begin(index, task)
    index.confirm(task)
    assert known(index, task).state == "running"
    assert [event.type for event in events()] == ["task.started"]
    assert index.submit(task).confirmed


def test_a_task_of_plain_amqp_is_on_record_from_its_first_run(index: StatusIndex) -> None:
    begun = begin(index, job(batch_id="b"))
    assert (begun.digest, begun.state, begun.cancel_requested) == (None, "running", False)
    assert index.list("default", state="running", batch_id="b").items
    assert index.ended(end(job("t2"), "failed")) is True
    assert known(index, job("t2")).state == "failed"


def test_a_redelivered_run_starts_over_without_a_second_event(
    index: StatusIndex, events: Callable[[], list[Event]]
) -> None:
    task = job()
    begin(index, task)
    index.progress("default", "t1", 0.9, "nearly")
    begin(index, task, worker="w2")
    status = known(index, task)
    assert (status.worker, status.progress, status.progress_note) == ("w2", None, None)
    assert [event.type for event in events()] == ["task.started", "task.progress"]


def lost(index: StatusIndex, attempt: int = 1, redrives: int = 0) -> int | None:
    count = begin(index, job(), attempt, redrives).orphaned_runs
    return None if count is None else int(count)


def test_runs_that_began_and_came_to_no_end_are_counted(index: StatusIndex) -> None:
    index.submit(job())
    assert [lost(index) for _ in range(4)] == [0, 1, 2, 3]


def test_a_cancel_of_a_task_that_only_the_broker_knows_waits_for_it(index: StatusIndex) -> None:
    line = job("b.1", batch_id="b", batch_line=1)
    for task in (job("t1"), line):
        assert index.request_cancel("default", task.task_id) is None
        assert begin(index, task).cancel_requested
        assert begin(index, task).cancel_requested, "also when it is delivered again"
    # A task that is submitted only now is another one.
    assert index.request_cancel("default", "t2") is None
    index.submit(job("t2"))
    index.confirm(job("t2"))
    assert not begin(index, job("t2")).cancel_requested
    # Recorded late: Redis was unavailable at the submission.
    assert index.request_cancel("default", "t3") is None
    index.confirm(job("t3"))
    assert begin(index, job("t3")).cancel_requested


def test_a_cancel_that_no_worker_has_taken_is_found_by_its_age(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    task = job()
    index.submit(task)
    assert index.untaken_cancel("default", "t1", 0) is None
    index.request_cancel("default", "t1")
    assert index.untaken_cancel("default", "t1", 60) is None
    ahead = datetime.now(UTC) + timedelta(days=30)
    for since in (
        "1",
        str(int(ahead.timestamp() * 1e6)),
    ):  # a version that kept no time; a clock that was ahead
        redis_client.hset(record_key("default", "t1"), "x", since)
        assert index.untaken_cancel("default", "t1", 60) == task.digest()


@pytest.mark.parametrize("ending", ["retrying", "failed", "cancelled", "succeeded", "released"])
def test_an_orderly_end_of_a_run_starts_the_count_anew(index: StatusIndex, ending: str) -> None:
    assert [lost(index), lost(index)] == [0, 1]
    match ending:
        case "retrying":
            index.retrying(job(), attempt=1, redrives=0, error=ERROR)
            assert lost(index, attempt=2) == 0
            assert lost(index, attempt=2) == 1
        case "released":
            begin(index, job(), run="last")
            index.released(job(), attempt=1, redrives=0, run="last")
            index.released(job(), attempt=1, redrives=0, run="last")
            assert [lost(index), lost(index)] == [0, 1]
        case status:
            index.ended(end(job(), status))
            assert [lost(index), lost(index)] == [None, None]
            if status != "succeeded":
                assert lost(index, redrives=1) == 0


def test_a_later_attempt_or_redrive_starts_the_count_anew_even_where_the_end_before_it_went_unseen(
    index: StatusIndex,
) -> None:
    assert [lost(index), lost(index)] == [0, 1]
    assert [lost(index, attempt=2), lost(index, attempt=2)] == [0, 1]
    assert [lost(index, redrives=1), lost(index, redrives=1)] == [0, 1]


def test_late_copies_and_other_tasks_of_the_same_id_are_not_counted(index: StatusIndex) -> None:
    assert lost(index, attempt=2) == 0
    assert lost(index, attempt=1) is None
    index.released(job(), attempt=1, redrives=0, run="first")
    assert begin(index, job(text="other"), attempt=2).orphaned_runs is None
    assert lost(index, attempt=2) == 1


def test_what_does_not_say_when_it_was_created_was_so_before_it_began(index: StatusIndex) -> None:
    started = datetime.now(UTC) - timedelta(seconds=5)
    begin_run(index, job(), started_at=started)
    assert known(index, job()).created_at == known(index, job()).started_at


def test_a_begin_that_is_repeated_after_a_lost_answer_counts_once(index: StatusIndex) -> None:
    assert begin(index, job(), run="first").orphaned_runs == 0
    assert begin(index, job(), run="first").orphaned_runs == 0
    assert begin(index, job(), run="second").orphaned_runs == 1
    assert begin(index, job(), run="second").orphaned_runs == 1
    assert begin(index, job(), run="third").orphaned_runs == 2


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["begin", "begin", "begin", "released", "retrying", "failed", "succeeded"]),
            st.integers(1, 2),
            st.integers(0, 1),
            st.sampled_from("abcd"),
        ),
        max_size=30,
    )
)
def test_in_any_order_of_calls_only_runs_in_a_row_without_an_end_are_counted(
    index: StatusIndex, redis_client: redis.Redis, calls: list[tuple[str, int, int, str]]
) -> None:
    redis_client.flushall()
    furthest: tuple[int, int, int] = (-1, 0, 0)  # redrives, attempt, rank
    began: list[str] = []
    for name, attempt, redrives, run in calls:
        match name:
            case "begin":
                place = (redrives, attempt, 2)
                if place > furthest:
                    furthest, began = place, []
                expected = None
                if place == furthest:
                    began += [run] if began[-1:] != [run] else []
                    expected = len(began) - 1
                assert begin(index, job(), attempt, redrives, run=run).orphaned_runs == expected
            case "released":
                index.released(job(), attempt=attempt, redrives=redrives, run=run)
                if (redrives, attempt, 2) == furthest and began[-1:] == [run]:
                    began = []
            case "retrying":
                index.retrying(job(), attempt=attempt, redrives=redrives, error=ERROR)
                furthest = max(furthest, (redrives, attempt, 3))
            case status:
                index.ended(end(job(), status, attempts=attempt, redrives=redrives))
                ends = (redrives if status == "failed" else 99, 99999, 4)
                furthest = max(furthest, ends)


def test_late_messages_of_earlier_attempts_change_nothing(index: StatusIndex) -> None:
    task = job()
    begin(index, task, attempt=3)
    before = known(index, task)
    assert begin(index, task, attempt=2, worker="late").state == "running"
    index.retrying(task, attempt=2, redrives=0, error=ERROR)
    index.confirm(task)
    assert known(index, task) == before


def test_the_trace_of_a_task_is_in_its_status_and_in_every_event(
    index: StatusIndex, events: Callable[[], list[Event]]
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    task = job(batch_id="b1")
    submission = index.submit(task, trace_id=trace_id)
    assert (submission.status.trace_id, submission.status.batch_id) == (trace_id, "b1")
    index.confirm(task, trace_id=trace_id)
    begin_run(index, task, trace_id=trace_id)
    index.progress("default", "t1", 0.5, None)
    index.retrying(task, attempt=1, redrives=0, error=ERROR, trace_id=trace_id)
    index.ended(end(task, attempts=2, trace_id=trace_id))
    assert known(index, task).trace_id == trace_id
    found = events()
    assert len(found) == 5
    assert {event.data.trace_id for event in found} == {trace_id}


@pytest.mark.parametrize("first", ["confirm", "begin", "retrying", "ended"])
def test_a_task_without_a_record_gets_one_with_its_trace(index: StatusIndex, first: str) -> None:
    trace_id, task = "a" * 32, job()
    match first:
        case "confirm":
            index.confirm(task, trace_id=trace_id)
        case "begin":
            begin_run(index, task, trace_id=trace_id)
        case "retrying":
            index.retrying(task, attempt=1, redrives=0, error=ERROR, trace_id=trace_id)
        case _:
            index.ended(end(task, trace_id=trace_id))
    status = known(index, task)
    assert (status.trace_id, status.batch_id) == (trace_id, None)


def test_progress_only_grows_and_only_while_running(index: StatusIndex) -> None:
    task = job()
    index.submit(task)
    index.progress("default", "t1", 0.5, "early")
    assert known(index, task).progress is None
    begin(index, task)
    for fraction, shown in [(0.4, 0.4), (0.2, 0.4), (7.0, 1.0), (float("nan"), 1.0), (-1.0, 1.0)]:
        index.progress("default", "t1", fraction, "n" * 2000 + "\ud800")
        status = known(index, task)
        assert status.progress == shown
        assert len(status.progress_note or "") == 500
    index.ended(end(task, "failed"))
    index.progress("default", "t1", 1.0, "late")
    assert known(index, task).progress_note is None


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_the_progress_of_a_run_ends_with_the_run(index: StatusIndex, state: EndState) -> None:
    task = job()
    begin(index, task)
    index.progress("default", "t1", 0.5, "5 of 10 characters")
    result = end(task, state)
    assert index.ended(result)
    status, of_result = known(index, task), TaskStatus.of_result(result)
    assert status.progress_note is None
    assert (status.progress, status.progress_note) == (of_result.progress, of_result.progress_note)


def test_a_task_that_waits_for_its_next_attempt_has_no_progress(index: StatusIndex) -> None:
    task = job()
    begin(index, task)
    index.progress("default", "t1", 0.5, "5 of 10 characters")
    index.retrying(task, attempt=1, redrives=0, error=ERROR)
    status = known(index, task)
    assert (status.state, status.progress, status.progress_note) == ("retrying", None, None)


def test_an_end_of_any_attempt_ends_the_task_until_it_is_redriven(index: StatusIndex) -> None:
    task = job()
    begin(index, task, attempt=4)
    assert index.ended(end(task, "cancelled", attempts=3)) is True
    assert begin(index, task, attempt=5).state == "cancelled"
    assert index.ended(end(task, "failed", attempts=5)) is False
    assert begin(index, task, attempt=1, redrives=1).state == "running"
    status = known(index, task)
    assert (status.state, status.error, status.finished_at, status.attempt) == ("running", None, None, 1)
    assert index.ended(end(task, "failed", redrives=1)) is True
    assert index.ended(end(task, "failed", redrives=1)) is False
    assert index.ended(end(task, "succeeded")) is True, "a success outranks everything, however late"
    assert index.ended(end(task, "succeeded", redrives=5)) is False
    assert begin(index, task, redrives=9).state == "succeeded"
    assert index.ended(end(task, "failed", redrives=9)) is False


def test_a_result_without_digest_ends_the_task_of_its_id(index: StatusIndex) -> None:
    task = job()
    index.submit(task)
    assert index.ended(end(task, "failed", digest=None, task_type="", attempts=0))
    status = known(index, task)
    assert (status.state, status.attempt, status.task_type) == ("failed", 1, "job")
    assert index.ended(end(job("unread"), "failed", digest=None, task_type="", attempts=0))
    assert known(index, job("unread")).task_type == ""


def test_a_cancellation_reaches_the_run_and_ends_with_it(index: StatusIndex) -> None:
    task = job()
    index.submit(task)
    asked = index.request_cancel("default", "t1")
    assert asked
    assert asked.cancel_requested
    assert index.cancel_requested("default", "t1")
    assert begin(index, task).cancel_requested
    index.ended(end(task, "cancelled"))
    assert begin(index, task, redrives=1).cancel_requested is False, "a redrive is a new decision"
    index.ended(end(task, redrives=1))
    done = index.request_cancel("default", "t1")
    assert done
    assert (done.state, done.cancel_requested) == ("succeeded", False)


def test_large_outputs_stay_out_of_events(index: StatusIndex, events: Callable[[], list[Event]]) -> None:
    index.ended(end(job(), output="x" * 100_000))
    assert events()[0].data.output is None


def test_odd_text_is_carried(index: StatusIndex, events: Callable[[], list[Event]]) -> None:
    task = job(metadata={"k": "\ud800 😀 \0"})
    index.submit(task)
    index.confirm(task)
    begin(index, task, worker="w\ud800")
    index.retrying(
        task, attempt=1, redrives=0, error=ErrorInfo(code="c", message="\ud83d'\"\\", retryable=False)
    )
    index.ended(end(task, output="\ud800"))
    assert len(events()) == 4


def test_a_client_that_does_not_decode_works_too(
    shared_redis: RedisServer, redis_client: redis.Redis
) -> None:
    with redis.Redis(port=shared_redis.port) as client:
        index = StatusIndex(client, retention=60)
        index.submit(job())
        begin(index, job())
        assert known(index, job()).state == "running"
        assert [status.task_id for status in index.list("default").items] == ["t1"]
        assert index.cancel_requested("default", "t1") is False


# What may happen to a task, in any order and any number of times.
_calls = st.one_of(
    st.tuples(st.sampled_from(["submit", "confirm", "forget", "cancel"]), st.just(1), st.just(0)),
    st.tuples(
        st.sampled_from(["begin", "released", "progress", "retrying", "succeeded", "failed", "cancelled"]),
        st.integers(1, 3),
        st.integers(0, 2),
    ),
)


@settings(
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(calls=st.lists(_calls, max_size=25))
def test_no_order_of_calls_moves_a_task_backwards_or_counts_an_end_twice(
    index: StatusIndex, redis_client: redis.Redis, calls: list[tuple[str, int, int]]
) -> None:
    redis_client.flushall()
    task = job(batch_id="b")
    order, ends = -1, []
    for name, attempt, redrives in calls:
        before = index.get("default", "t1")
        match name:
            case "submit":
                index.submit(task)
            case "confirm":
                index.confirm(task)
            case "forget":
                index.forget(task)
            case "cancel":
                index.request_cancel("default", "t1")
            case "begin":
                begin(index, task, attempt, redrives)
            case "released":
                index.released(task, attempt=attempt, redrives=redrives, run="r")
                assert index.get("default", "t1") == before
            case "progress":
                index.progress("default", "t1", attempt / 3, None)
            case "retrying":
                index.retrying(task, attempt=attempt, redrives=redrives, error=ERROR)
            case status:
                if index.ended(end(task, status, attempts=attempt, redrives=redrives)):
                    ends.append((redrives, status))
        after = index.get("default", "t1")
        raw = redis_client.hget(record_key("default", "t1"), "o")
        if raw is None:
            assert before is None or name == "forget"
            order = -1
            continue
        assert after
        assert int(raw) >= order
        if int(raw) == order and before and name != "begin":
            assert after.state == before.state
        order = int(raw)
        if before and before.state == "succeeded":
            assert after == before
        if before and before.ended and not after.ended:
            assert name in {"begin", "retrying"}
        assert (after.state in END_STATES) == (after.finished_at is not None)
        # Every index agrees with the record.
        assert index.list("default").items == (after,)
        assert index.list("default", batch_id="b").items == (after,)
        for state in ("queued", "running", "retrying", "succeeded", "failed", "cancelled"):
            assert index.list("default", state=state).items == ((after,) if after.state == state else ())
    assert len(ends) == len(set(ends)), "an end was counted twice"
    assert sum(status == "succeeded" for _, status in ends) <= 1
    assert ends == sorted(ends, key=lambda e: (e[1] == "succeeded", e[0]))
    assert len({redrives for redrives, status in ends if status != "succeeded"}) == sum(
        status != "succeeded" for _, status in ends
    )


def test_everything_expires(shared_redis: RedisServer, redis_client: redis.Redis) -> None:
    index = StatusIndex(redis_client, retention=1)
    for number in range(5):
        index.submit(job(f"t{number}", batch_id="b"))
    index.ended(end(job("t0"), "failed"))
    for key in redis_client.keys("*"):
        assert 0 < redis_client.ttl(key) <= 86402
    eventually(lambda: index.get("default", "t4") is None)
    index.submit(job("new1"))
    assert redis_client.zcard("inferq:l:default") < 6, "an entry that comes lets expired ones go"
    assert [status.task_id for status in index.list("default").items] == ["new1"]
    assert redis_client.zcard("inferq:l:default") == 1
    assert index.list("default", state="failed").items == ()
    assert redis_client.exists("inferq:s:default:failed") == 0


def test_a_change_renews_the_retention(index: StatusIndex, redis_client: redis.Redis) -> None:
    task = job()
    key = record_key("default", "t1")
    changes: list[Callable[[], object]] = [
        lambda: index.submit(task),
        lambda: index.confirm(task),
        lambda: index.request_cancel("default", "t1"),
        lambda: begin(index, task),
        lambda: index.progress("default", "t1", 0.5, None),
        lambda: index.retrying(task, attempt=1, redrives=0, error=ERROR),
        lambda: index.ended(end(task)),
    ]
    for change in changes:
        redis_client.expire(key, 5)
        change()
        assert redis_client.ttl(key) > 600_000


def test_a_record_is_small(index: StatusIndex, redis_client: redis.Redis) -> None:
    task = job("0190b5a0-7e1c-7c3e-8f4a-0123456789ab")
    index.submit(task)
    index.confirm(task)
    begin(index, task, worker="worker-ocr-0-abcdef")
    index.ended(end(task, worker="worker-ocr-0-abcdef"))
    assert (redis_client.memory_usage(record_key("default", task.task_id)) or 0) < 500
    assert redis_client.object("encoding", record_key("default", task.task_id)) == "listpack"


def test_progress_events_are_events(index: StatusIndex, events: Callable[[], list[Event]]) -> None:
    begin(index, job())
    for fraction in (0, 1 / 3, 1):
        index.progress("default", "t1", fraction, None)
    found = [event for event in events() if event.type == "task.progress"]
    assert [event.data.progress for event in found] == [0, 0.3333, 1]
    assert json.loads(found[0].model_dump_json())["data"]["state"] == "running"
