"""The status index: every change once, never backwards, and quick to say that it is away."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.schemas import (
    END_STATES,
    EndState,
    ErrorInfo,
    Event,
    InstallationError,
    InvalidTask,
    Result,
    Task,
    TaskStatus,
)
from inferq.storage import BatchIndex, CallbackRecords, StatusIndex, StatusOutage, StorageSettings
from inferq.storage.objects.local import LocalStore
from inferq.storage.status.keys import record_key
from inferq.storage.status.usage import USAGE_DAYS, Usage, usage_key
from tests.runs import begin_run
from tests.storage.conftest import RedisServer
from tests.waiting import eventually

NOW = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)
ERROR = ErrorInfo(code="boom", message="it broke", retryable=True)
Race = Callable[[int, Callable[[int], object]], list[object]]


class Job(Task):
    task_type: Literal["job"] = "job"
    text: str = "x"


def job(task_id: str = "t1", **more: Any) -> Job:
    return Job(task_id=task_id, **more)


def end(
    task: Task, status: str = "succeeded", *, attempts: int = 1, redrives: int = 0, **more: Any
) -> Result:
    return Result(
        **{
            "task_id": task.task_id, "task_type": task.task_type, "tenant": task.tenant,
            "status": status, "attempts": attempts, "redrives": redrives, "finished_at": datetime.now(UTC),
            "digest": task.digest(), "batch_id": task.batch_id,
            "error": None if status == "succeeded" else ERROR, **more,
        }
    )  # fmt: skip


def begin(
    index: StatusIndex,
    task: Task,
    attempt: int = 1,
    redrives: int = 0,
    worker: str = "w1",
    run: str | None = None,
    silence: float = 0.0,
) -> Any:
    return begin_run(index, task, attempt=attempt, redrives=redrives, worker=worker, run=run, silence=silence)


def known(index: StatusIndex, task: Task) -> TaskStatus:
    status = index.get(task.tenant, task.task_id)
    assert status
    return status


@pytest.fixture
def events(redis_client: redis.Redis) -> Iterator[Callable[[], list[Event]]]:
    """What was published since, for every task."""
    listener: Any = redis_client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    listener.psubscribe("inferq:events:*")
    eventually(lambda: redis_client.pubsub_numpat() >= 1)
    seen: list[Event] = []
    marks = iter(range(10**6))

    def collect() -> list[Event]:
        mark = f"mark {next(marks)}"
        redis_client.publish("inferq:events:mark", mark)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            message = listener.get_message(timeout=0.2)
            if message is None or message["data"] is None or message["type"] != "pmessage":
                continue
            if message["data"] == mark:
                found = list(seen)
                seen.clear()
                return found
            event = Event.model_validate_json(message["data"])
            assert message["channel"] == StatusIndex.channel(event.data.tenant, event.data.task_id)
            seen.append(event)
        raise AssertionError("the events did not come")

    yield collect
    listener.close()


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


def test_of_runs_that_begin_at_once_one_holds_the_lease(index: StatusIndex, race: Race) -> None:
    index.submit(job())
    found: list[Any] = race(16, lambda n: begin(index, job(), worker=f"w{n}", run=f"run {n}", silence=600))
    (holder,) = {begun.other_run for begun in found} - {""}
    assert [f"run {n}" for n, begun in enumerate(found) if not begun.other_run] == [holder.partition(" ")[2]]
    # One that does not begin changes nothing.
    assert known(index, job()).worker == f"w{holder.rpartition(' ')[2]}"
    assert {begun.orphaned_runs for begun in found} == {0, None}


def test_a_lease_changes_with_each_sign_of_life_of_its_run(index: StatusIndex) -> None:
    begin(index, job(), run="a")

    def seen() -> str:
        return str(begin(index, job(), run="b", silence=600).other_run)

    before = seen()
    index.cancel_requested("default", "t1", run="b")
    index.cancel_requested("default", "t1")
    assert seen() == before

    def renewed() -> bool:
        index.cancel_requested("default", "t1", run="a")
        return seen() != before

    eventually(renewed)  # once the clock's next millisecond has begun


def test_a_copy_of_an_earlier_attempt_begins_only_if_told_to(index: StatusIndex) -> None:
    def copy(redrives: int = 0, *, repeats: bool) -> tuple[bool, str]:
        begun = begin_run(index, job(), redrives=redrives, run="copy", silence=600, repeats=repeats)
        return begun.past, begun.other_run.partition(" ")[2]

    begin(index, job(), run="a")
    assert copy(repeats=False) == (False, "a")
    index.retrying(job(), attempt=1, redrives=0, error=ERROR, run="a")
    assert copy(repeats=False) == (True, "")
    assert index.lease_holder("default", "t1") == ""
    assert copy(repeats=True) == (False, "")
    assert index.lease_holder("default", "t1") == "copy"
    index.ended(end(job(), "failed"))
    assert copy(repeats=False) == (False, "")
    begin(index, job(), redrives=1, run="of a redrive")
    assert copy(repeats=False) == (True, "of a redrive")


def test_a_run_that_began_without_redis_takes_a_free_lease_until_the_task_ends(index: StatusIndex) -> None:
    def holder(run: str) -> str:
        index.cancel_requested("default", "t1", run=run, running=True)
        return index.lease_holder("default", "t1")

    index.submit(job())
    index.cancel_requested("default", "t1", run="waits for its engine")
    assert index.lease_holder("default", "t1") == ""
    assert holder("a") == holder("b") == "a"
    assert begin(index, job(), run="b", silence=600).other_run
    index.ended(end(job(), "failed"))
    assert holder("a") == ""


def test_a_check_for_a_cancel_makes_no_record(index: StatusIndex, redis_client: redis.Redis) -> None:
    index.cancel_requested("default", "t1", run="a", running=True)
    assert not redis_client.exists(record_key("default", "t1"))


LEASE_CALLS = ["begin"] * 4 + ["renew", "age"] * 2 + ["ahead", "lost", "released", "retrying", "failed"]


@settings(
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(LEASE_CALLS),
            st.integers(1, 2),
            st.sampled_from([0, 1, 1, 1]),
            st.sampled_from("ab"),
            st.sampled_from([60, 600]),
        ),
        min_size=10,
        max_size=30,
    )
)
def test_in_any_order_of_calls_a_run_begins_only_where_no_other_is_alive(
    index: StatusIndex, redis_client: redis.Redis, calls: list[tuple[str, int, int, str, int]]
) -> None:
    redis_client.flushall()
    key = record_key("default", "t1")
    holder, silent = "", 0  # the run that holds the lease, and for how many seconds it gave no sign of life
    ended = -1  # the redrive whose end is on record

    def shift(seconds: int) -> None:
        if lease := redis_client.hget(key, "h"):
            at, _, run = str(lease).partition(" ")
            redis_client.hset(key, "h", f"{int(at) - seconds * 1000} {run}")

    for name, attempt, later, run, seconds in calls:
        redrives = max(0, ended + later)
        match name:
            case "begin":
                begun = begin(index, job(), attempt, redrives, run=run, silence=seconds)
                over = redrives <= ended
                alive = holder not in ("", run) and 0 <= silent < seconds
                assert bool(begun.other_run) == alive
                if alive:
                    assert begun.other_run.partition(" ")[2] == holder
                    assert begun.orphaned_runs is None
                elif not over:
                    holder, silent = run, 0
            case "renew":
                index.cancel_requested("default", "t1", run=run)
                silent = 0 if run == holder else silent
            case "age":
                shift(120)
                silent += 120
            case "ahead":
                shift(-240)
                silent -= 240
            case "lost" | "released":
                index.released(job(), attempt=attempt, redrives=redrives, run=run, keep_lease=name == "lost")
                holder = "" if run == holder and name == "released" else holder
            case "retrying":
                index.retrying(job(), attempt=attempt, redrives=redrives, error=ERROR, run=run)
                holder = "" if run == holder else holder
            case "failed":
                if index.ended(end(job(), "failed", attempts=attempt, redrives=redrives)):
                    holder, ended = "", redrives


def test_a_run_releases_no_run_that_began_after_it(index: StatusIndex) -> None:
    begin(index, job(), run="first")
    begin(index, job(), run="second")
    index.released(job(), attempt=1, redrives=0, run="first")
    assert begin(index, job(), run="third").orphaned_runs == 2


def test_giving_back_an_unknown_task_makes_no_record(index: StatusIndex) -> None:
    index.released(job(), attempt=1, redrives=0, run="r")
    assert index.get("default", "t1") is None


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


def listed(index: StatusIndex, limit: int, **filters: Any) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = index.list("default", cursor=cursor, limit=limit, **filters)
        assert len(page.items) <= limit
        found += [status.task_id for status in page.items]
        cursor = page.cursor
        if cursor is None:
            return found


def test_pages_hold_every_task_once_even_where_all_were_made_at_once(index: StatusIndex) -> None:
    now = datetime.now(UTC)
    ids = [f"id{number:03d}" for number in range(120)]
    for number, task_id in enumerate(ids):
        index.submit(job(task_id, created_at=now - timedelta(seconds=number // 50)))
    expected = sorted(ids, key=lambda i: (-(int(i[2:]) // 50), i), reverse=True)
    for limit in (1, 7, 50, 119, 120, 121, 10_000, 0):
        assert listed(index, max(limit, 1)) == expected
    page = index.list("default", limit=120)
    assert page.cursor is None, "the last page knows that it is"


def test_a_cursor_holds_while_tasks_come_and_go(index: StatusIndex, redis_client: redis.Redis) -> None:
    now = datetime.now(UTC)
    tasks = [job(f"id{n}", created_at=now) for n in range(9, -1, -1)]
    for task in tasks:
        index.submit(task)
    page = index.list("default", limit=4, state="queued")
    assert [status.task_id for status in page.items] == ["id9", "id8", "id7", "id6"]
    index.submit(job("newer"))
    begin(index, job("id6", created_at=now))  # leaves the state's index: the cursor's own entry is gone
    redis_client.delete(record_key("default", "id5"))
    rest = index.list("default", limit=10, state="queued", cursor=page.cursor)
    assert [status.task_id for status in rest.items] == ["id4", "id3", "id2", "id1", "id0"]
    everything = index.list("default", limit=10, cursor=index.list("default", limit=5).cursor)
    assert [status.task_id for status in everything.items] == ["id4", "id3", "id2", "id1", "id0"]
    assert listed(index, 3, state="running") == ["id6"]


def test_filters_combine(index: StatusIndex) -> None:
    class Other(Task):
        task_type: Literal["other"] = "other"

    now = datetime.now(UTC)
    for number in range(40):
        kind = Job if number % 2 else Other
        task = kind(
            task_id=f"t{number:02d}",
            created_at=now + timedelta(microseconds=number - 100),
            batch_id="ab"[number % 3 > 0],
        )
        index.submit(task)
        if number % 5 == 0:
            index.ended(end(task, "failed" if number % 10 else "succeeded"))
    every = range(39, -1, -1)

    def ids(keep: Callable[[int], bool]) -> list[str]:
        return [f"t{number:02d}" for number in every if keep(number)]

    for limit in (1, 3, 50):
        assert listed(index, limit, task_type="job") == ids(lambda n: n % 2 == 1)
        assert listed(index, limit, state="succeeded") == ids(lambda n: n % 10 == 0)
        assert listed(index, limit, state="failed") == ids(lambda n: n % 10 == 5)
        assert listed(index, limit, batch_id="a") == ids(lambda n: n % 3 == 0)
        assert listed(index, limit, batch_id="b", state="queued", task_type="other") == ids(
            lambda n: n % 3 > 0 and n % 5 > 0 and n % 2 == 0
        )
        assert listed(index, limit, batch_id="none") == []
        assert listed(index, limit, task_type="none") == []
    assert index.list("someone-else").items == ()


def test_a_rare_task_is_found_behind_very_many_others(index: StatusIndex, redis_client: redis.Redis) -> None:
    now = datetime.now(UTC)
    index.ended(end(job("rare", created_at=now), created_at=now - timedelta(hours=1)))
    with redis_client.pipeline() as pipe:
        for number in range(1200):
            micros = int(now.timestamp() * 1e6)
            pipe.hset(record_key("default", f"n{number}"), mapping={"s": "queued", "ty": "job", "o": 1})
            pipe.zadd("inferq:l:default", {f"n{number}": micros})
        pipe.execute()
    assert listed(index, 5, state="succeeded") == ["rare"]


@pytest.mark.parametrize(
    "cursor", ["x", "!!!", "AAAA", "e30", "1:", "1:a\n", "MTph", "é", "MTpcbg==", "a" * 5000, "\ud800"]
)
def test_a_bad_cursor_is_refused(index: StatusIndex, cursor: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        index.list("default", cursor=cursor)
    assert caught.value.code == "bad_cursor"


def test_made_up_creation_times_neither_hide_nor_keep_a_task(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    old, future = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
    index.submit(job("old", created_at=old))
    index.submit(job("future", created_at=future))
    index.submit(job("now"))
    assert listed(index, 10) == ["now", "future", "old"]
    assert known(index, job("future")).created_at == future
    assert known(index, job("old")).created_at == old
    now = time.time() * 1e6
    scores: Any = redis_client.zrange("inferq:l:default", 0, -1, withscores=True)
    for _, score in scores:
        assert now - 8 * 86400e6 < float(score) <= now


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


def test_flushed_scripts_come_back_by_themselves(index: StatusIndex, redis_client: redis.Redis) -> None:
    index.submit(job())
    redis_client.script_flush()
    assert begin(index, job()).state == "running"
    redis_client.script_flush()
    assert index.list("default").items


@pytest.fixture
def doomed(own_redis: RedisServer) -> Iterator[StatusIndex]:
    index = StatusIndex.from_settings(StorageSettings(redis_url=own_redis.url, redis_timeout=0.3))
    yield index
    index.close()


def test_a_killed_redis_is_an_outage_and_no_more_when_it_is_back(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    doomed.ping()
    doomed.submit(job())
    own_redis.kill()
    calls: list[Callable[[], object]] = [
        lambda: doomed.submit(job()),
        lambda: doomed.get("default", "t1"),
        lambda: doomed.list("default"),
        lambda: doomed.ended(end(job())),
        doomed.ping,
    ]
    for call in calls:
        with pytest.raises(StatusOutage, match="INFERQ_REDIS_URL"):
            call()
    own_redis.start()

    def back() -> bool:
        try:
            return doomed.submit(job()).new
        except StatusOutage:
            return False

    eventually(back)
    assert begin(doomed, job()).state == "running"
    assert doomed.list("default", state="running").items


def test_how_long_redis_is_away_counts_from_the_first_failure(
    own_redis: RedisServer, redis_client: redis.Redis
) -> None:
    now = [100.0]
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60, clock=lambda: now[0])
        index.ping()
        assert index.unavailable_for is None
        own_redis.kill()
        for _ in range(3):
            with pytest.raises(StatusOutage):
                index.ping()
            now[0] += 2.0
        assert index.unavailable_for == 6.0
        own_redis.start()
        index.ping()
        assert index.unavailable_for is None
        client.set(record_key("default", "t1"), "not a hash")
        with pytest.raises(StatusOutage):
            begin(index, job())
        assert index.unavailable_for is None, "a Redis that answers is not away"


def test_a_restart_between_two_calls_goes_unnoticed(own_redis: RedisServer, doomed: StatusIndex) -> None:
    doomed.submit(job())
    own_redis.kill()
    own_redis.start()
    assert doomed.submit(job()).new


def test_a_hanging_redis_costs_the_timeout_once_and_not_for_every_caller(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    doomed.ping()
    own_redis.freeze(True)
    try:
        began = time.monotonic()
        with pytest.raises(StatusOutage):
            doomed.ping()
        assert time.monotonic() - began > 0.2
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(StatusOutage):
                doomed.get("default", "t1")
        assert time.monotonic() - began < 15  # each for itself would wait 0.3 s
    finally:
        own_redis.freeze(False)
    eventually(lambda: _answers(doomed))


def _answers(index: StatusIndex) -> bool:
    try:
        index.ping()
    except StatusOutage:
        return False
    return True


def test_while_one_caller_looks_whether_redis_is_back_the_others_fail_at_once() -> None:
    now = [0.0]
    entered, leave = threading.Event(), threading.Event()

    class Hanging(redis.Redis):
        calls = 0

        def evalsha(self, *_: Any, **__: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                entered.set()
                leave.wait(60)
            raise redis.ConnectionError("away")

    client = Hanging()
    index = StatusIndex(client, retention=60, clock=lambda: now[0])
    with pytest.raises(StatusOutage):
        index.ping()
    now[0] = 1.1
    thread = threading.Thread(target=lambda: _answers(index))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(StatusOutage):
        index.ping()
    assert client.calls == 2
    leave.set()
    thread.join()


def test_a_redis_that_refuses_is_an_outage_that_names_the_reason(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    with redis.Redis(port=own_redis.port) as admin:
        admin.config_set("requirepass", "secret-word")
    locked = StatusIndex.from_settings(
        StorageSettings(redis_url=f"redis://:wrong-word@127.0.0.1:{own_redis.port}/0")
    )
    with pytest.raises(StatusOutage, match=r"refuses the login: .*; correct the user and password") as caught:
        locked.ping()
    assert "wrong-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("maxmemory", "used memory > 'maxmemory'"), ("min-replicas-to-write", "good replicas")],
)
def test_a_redis_that_only_reads_is_away_for_reads_as_well(
    own_redis: RedisServer, setting: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60, clock=lambda: now[0])
        index.submit(job())
        client.config_set(setting, "1")
        batches, callbacks = BatchIndex(index), CallbackRecords(LocalStore(Path("/nowhere")), index)
        reads: list[Callable[[], object]] = [
            index.ping,
            lambda: index.get("default", "unknown"),
            lambda: index.get("default", "t1"),
            lambda: index.list("default"),
            lambda: index.cancel_requested("default", "unknown"),
            lambda: index.request_cancel("default", "unknown"),
            lambda: batches.look("default", "b"),
            lambda: batches.is_fed("default", "b", 1),
            lambda: callbacks.indexed("default", "task", "t1"),
            lambda: callbacks.failures("default"),
            index.warm_up,
        ]
        for read in reads:
            with pytest.raises(StatusOutage, match=f"refuses writes: .*{reason}"):
                read()
            now[0] += 1.0
        assert index.unavailable_for == len(reads)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        client.config_set(setting, "0")
        assert known(index, job()).state == "queued"
        assert index.unavailable_for is None


def test_a_database_that_redis_lacks_is_an_outage_that_says_what_to_correct(
    shared_redis: RedisServer,
) -> None:
    with redis.Redis(port=shared_redis.port, db=99, decode_responses=True) as client:
        with pytest.raises(StatusOutage, match=r"out of range; .* and a database that it has"):
            StatusIndex(client, retention=60).ping()


def test_a_redis_that_drops_keys_is_warned_of(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60)
        client.config_set("maxmemory-policy", "allkeys-lru")
        index.require_supported()  # without a limit nothing is dropped
        assert caplog.records == []
        client.config_set("maxmemory", "100mb")
        index.require_supported()
        assert "maxmemory-policy allkeys-lru" in caplog.text
        assert "set maxmemory-policy noeviction" in caplog.text
        client.config_set("maxmemory-policy", "noeviction")
        caplog.clear()
        index.require_supported()
        assert caplog.records == []


def test_after_a_failover_old_connections_to_the_former_master_are_dropped(
    own_redis: RedisServer, shared_redis: RedisServer, redis_client: redis.Redis
) -> None:
    """The address leads to the new master, but connections to the old one, now a replica, stay open."""
    master = own_redis.port

    class Connection(redis.Connection):
        def _connect(self) -> Any:
            self.port = master
            return super()._connect()

    pool = redis.ConnectionPool(connection_class=Connection, port=0, decode_responses=True)
    index = StatusIndex(redis.Redis(connection_pool=pool), retention=60)
    index.ping()
    with redis.Redis(port=own_redis.port) as old:
        old.replicaof("127.0.0.1", shared_redis.port)
    master = shared_redis.port
    assert index.submit(job()).new
    assert index.unavailable_for is None
    assert known(index, job()).state == "queued"


def test_one_refused_command_does_not_make_redis_unavailable(
    index: StatusIndex, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis_client.set(record_key("default", "t1"), "not a hash")
    for _ in range(2):
        with pytest.raises(StatusOutage, match="refused a command"):
            index.get("default", "t1")
    assert index.unavailable_for is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_node_of_a_redis_cluster_is_refused_at_the_start(tmp_path: Path) -> None:
    bus = str(_free_port())
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", bus)
    index = StatusIndex.from_settings(StorageSettings(redis_url=server.url))
    index.require_supported()  # nothing answers yet: nothing is known
    try:
        server.start()
        eventually(lambda: _is_refused(index))
        with pytest.raises(StatusOutage, match=r"node of a Redis Cluster .* does not support"):
            index.submit(job())
    finally:
        index.close()
        server.kill()


def test_a_sentinel_is_refused_at_the_start(tmp_path: Path) -> None:
    port = _free_port()
    (tmp_path / "sentinel.conf").write_text(f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n")
    argv = ["redis-server", str(tmp_path / "sentinel.conf"), "--sentinel"]
    index = StatusIndex.from_settings(StorageSettings(redis_url=f"redis://127.0.0.1:{port}/0"))
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as sentinel:
        try:
            eventually(lambda: _is_refused(index))
        finally:
            index.close()
            sentinel.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _is_refused(index: StatusIndex) -> bool:
    try:
        index.require_supported()
    except InstallationError as error:
        assert "INFERQ_REDIS_URL" in error.message
        assert "does not support" in error.message
        return True
    return False


def test_the_answer_of_a_repeated_call_is_the_first_ones(
    own_redis: RedisServer, doomed: StatusIndex, redis_client: redis.Redis
) -> None:
    """A connection that dies after the command ran and before its answer came: the client sends it again."""
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60)
        script = index._scripts["ended"]

        class Twice:
            def __call__(self, **call: Any) -> Any:
                script(**call)
                return script(**call)

        index._scripts["ended"] = Twice()  # type: ignore[assignment]
        assert index.ended(end(job())) is True
        assert index.ended(end(job())) is False


def test_a_redis_by_unix_socket_is_named_by_its_path() -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url="unix:///nowhere/redis.sock"))
    with pytest.raises(StatusOutage, match=r"/nowhere/redis\.sock"):
        index.ping()


def test_progress_events_are_events(index: StatusIndex, events: Callable[[], list[Event]]) -> None:
    begin(index, job())
    for fraction in (0, 1 / 3, 1):
        index.progress("default", "t1", fraction, None)
    found = [event for event in events() if event.type == "task.progress"]
    assert [event.data.progress for event in found] == [0, 0.3333, 1]
    assert json.loads(found[0].model_dump_json())["data"]["state"] == "running"


def test_an_answer_that_nobody_fetched_is_not_taken_for_the_next(index: StatusIndex) -> None:
    first, second = job("t1"), job("t2")

    def start(task: Task) -> Callable[[], Any]:
        now = datetime.now(UTC)
        return index.begin_pipelined(
            task, attempt=1, redrives=0, worker="w", started_at=now, digest=task.digest(), run="r"
        )

    index.submit(second)
    forgotten = start(first)
    assert start(second)().digest == second.digest()
    assert forgotten().state == "running"
    ending = index.ended_pipelined(end(second))
    assert ending() is True
    assert known(index, second).state == "succeeded"
    assert index.ended_pipelined(end(second))() is False


def test_an_answer_is_fetched_on_any_thread(index: StatusIndex) -> None:
    begin(index, job())
    ending = index.ended_pipelined(end(job()))
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(ending()))
    thread.start()
    thread.join()
    assert known(index, job()).state == "succeeded"
    assert len(seen) == 1


def test_after_its_warm_up_a_run_neither_connects_nor_loads_a_script(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    def taken() -> list[int]:
        info: Any = redis_client.info("all")
        scripts = ("cmdstat_script|load", "cmdstat_eval")
        return [info["total_connections_received"], *(info.get(s, {"calls": 0})["calls"] for s in scripts)]

    redis_client.script_flush()
    index.warm_up()
    before = taken()
    answer = index.begin_pipelined(
        job(), attempt=1, redrives=0, worker="w", started_at=datetime.now(UTC), digest="d", run="r"
    )
    index.cancel_requested("default", "t1")
    answer()
    assert taken() == before


def test_a_warm_up_without_redis_is_an_outage(doomed: StatusIndex, own_redis: RedisServer) -> None:
    own_redis.kill()
    with pytest.raises(StatusOutage):
        doomed.warm_up()


# What tenants use.

DAY = date(2026, 11, 20)


def test_an_end_counts_in_the_usage_of_its_day_once(index: StatusIndex, redis_client: redis.Redis) -> None:
    midnight = datetime(2026, 11, 21, 0, 30, tzinfo=timezone(timedelta(hours=1)))  # the 20th, in UTC
    for name, status, seconds in (("a", "succeeded", 1.5), ("b", "failed", 0.25), ("c", "cancelled", 0.0)):
        task = job(name)
        begin(index, task)
        ended = end(task, status, finished_at=midnight)
        for call in (ended, ended, end(task, "failed", finished_at=midnight)):
            index.ended_pipelined(call, engine_seconds=seconds)()
    index.ended(end(job("d"), finished_at=midnight))  # reported again by a part that ran nothing
    assert index.usage([DAY, DAY + timedelta(days=1)]) == [
        Usage(DAY, "default", "job", succeeded=1, failed=1, cancelled=1, engine_seconds=1.75)
    ]
    assert 399 < redis_client.ttl(usage_key(DAY)) / 86400 <= USAGE_DAYS


def test_failed_attempts_count_in_the_usage_and_late_copies_do_not(index: StatusIndex) -> None:
    task = job(tenant="acme")
    begin(index, task)
    for attempt in (1, 1, 2, 1):
        index.retrying(task, attempt=attempt, redrives=0, error=ERROR, engine_seconds=2.0)
    index.retrying(job(tenant="acme", text="other"), attempt=9, redrives=0, error=ERROR, engine_seconds=2.0)
    today = datetime.now(UTC).date()
    assert index.usage([today]) == [Usage(today, "acme", "job", retried=2, engine_seconds=4.0)]


def test_a_line_of_a_batch_counts_in_the_usage_once(index: StatusIndex) -> None:
    batches = BatchIndex(index)
    task = job("b.1", batch_id="b", batch_line=1)
    batches.mark("default", "b", "fed", [1])
    begin(index, task)
    ended = end(task, batch_line=1, finished_at=NOW)
    for _ in range(2):
        index.ended_pipelined(ended, engine_seconds=3.0)()
    assert index.usage([NOW.date()]) == [Usage(NOW.date(), "default", "job", succeeded=1, engine_seconds=3.0)]


def test_usage_is_unknown_while_redis_is_unavailable(tmp_path: Path) -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url=f"unix://{tmp_path}/nobody"))
    with pytest.raises(StatusOutage):
        index.usage([DAY])
