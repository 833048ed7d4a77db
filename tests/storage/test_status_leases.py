"""The lease of a task: of its runs one goes on."""

from __future__ import annotations

from typing import Any

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.storage import StatusIndex
from inferq.storage.status.keys import record_key
from tests.runs import begin_run
from tests.storage.tasks import ERROR, Race, begin, end, job, known
from tests.waiting import eventually


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
