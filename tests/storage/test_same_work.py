"""Tasks that ask for the same: while a run of one computes it, no run of another begins."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.schemas import ErrorInfo, InvalidTask, Result, Task, parse_task
from inferq.storage import StatusIndex
from inferq.storage.status.keys import flight_key, record_key
from tests.runs import begin_run

Event = Literal["begin", "succeed", "retry", "fail", "release", "vanish"]
EVENTS: tuple[Event, ...] = ("begin", "succeed", "retry", "fail", "release", "vanish")
SILENCE = 10.0


def new_task(tenant: str = "default") -> Task:
    return parse_task({"task_id": uuid.uuid4().hex, "task_type": "echo", "tenant": tenant})


def succeeded(task: Task) -> Result:
    return Result(
        task_id=task.task_id, task_type="echo", tenant=task.tenant, status="succeeded", attempts=1,
        finished_at=datetime.now(UTC), digest=task.digest(),
    )  # fmt: skip


def vanish(index: StatusIndex, task: Task) -> None:
    """Let the lease look as if its run gave no sign of life for SILENCE."""
    key = record_key(task.tenant, task.task_id)
    at, _, run = index.lease(task.tenant, task.task_id).partition(" ")
    index.write(lambda redis: redis.hset(key, "h", f"{int(at) - round(SILENCE * 1000)} {run}"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(EVENTS)), max_size=12))
def test_one_of_those_that_ask_for_the_same_computes_until_it_ends_or_vanishes_or_the_work_fails(
    index: StatusIndex, events: Sequence[tuple[int, Event]]
) -> None:
    work = uuid.uuid4().hex
    tasks, attempts = [new_task() for _ in range(3)], [1, 1, 1]
    runs: dict[int, str] = {}
    computing: int | None = None
    ended: set[int] = set()
    failed = False
    for place, event in events:
        task, attempt = tasks[place], attempts[place]
        if event == "begin":
            if place in ended or place in runs:
                continue
            run, before = uuid.uuid4().hex, index.get("default", task.task_id)
            begun = begin_run(index, task, attempt=attempt, run=run, work=work)
            assert (begun.same_work is not None) == (computing is not None)
            if begun.same_work is None:
                runs[place] = run
                computing = None if failed else place
            else:
                assert 0 <= begun.same_work < 60
                assert index.lease_holder("default", task.task_id) != run
                assert index.get("default", task.task_id) == before
            continue
        if place not in runs:
            continue
        run = runs.pop(place)
        match event:
            case "succeed":
                index.ended(succeeded(task))
                ended.add(place)
            case "retry" | "fail":
                if event == "fail":
                    index.work_failed("default", work)
                    failed, computing = True, None
                error = ErrorInfo.of(InvalidTask("failed"))
                index.retrying(task, attempt=attempt, redrives=0, error=error, digest=task.digest(), run=run)
                attempts[place] += 1
            case "release":
                index.released(task, attempt=attempt, redrives=0, run=run)
            case "vanish":
                vanish(index, task)
        if computing == place:
            computing = None


@pytest.mark.parametrize("other", ["tenant", "work"])
def test_other_work_and_other_tenants_are_not_waited_for(index: StatusIndex, other: str) -> None:
    begin_run(index, new_task(), work="w")
    tenant = "another" if other == "tenant" else "default"
    begun = begin_run(index, new_task(tenant), work="another" if other == "work" else "w")
    assert begun.same_work is None


def test_who_takes_over_a_vanished_run_is_waited_for_in_its_place(index: StatusIndex) -> None:
    first, second, third = new_task(), new_task(), new_task()
    begin_run(index, first, work="w")
    assert begin_run(index, second, work="w").same_work is not None
    vanish(index, first)
    assert begin_run(index, second, work="w").same_work is None
    # The first one's message is delivered again.
    assert begin_run(index, first, work="w").same_work is not None
    assert begin_run(index, third, work="w").same_work is not None
    index.ended(succeeded(second))
    assert begin_run(index, third, work="w").same_work is None


def test_a_run_with_the_lease_of_a_task_that_is_computed_anew_does_not_wait_for_itself(
    index: StatusIndex,
) -> None:
    task = new_task()
    begin_run(index, task, run="of a killed worker", work="w")
    assert begin_run(index, task, run="again", work="w").same_work is None


def test_the_work_of_a_run_is_forgotten(index: StatusIndex) -> None:
    begin_run(index, new_task(), work="w")
    (left,) = index.read(("TTL", flight_key("default", "w")))
    assert 0 < left <= 60
    index.work_failed("default", "w")
    (left,) = index.read(("TTL", flight_key("default", "w")))
    assert 0 < left <= 60
