"""How many workers the waiting tasks need: the arithmetic, and the figures that it takes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from inferq.producer.demand import Backlog, demand_of
from inferq.schemas import PRIORITIES
from inferq.schemas.monitor import QueueFigures, Stats, TypeWorkers

NOW = datetime(2026, 11, 30, tzinfo=UTC)
COUNTS = st.integers(0, 300)
SECONDS = st.integers(1, 60)
TARGETS = st.integers(0, 600)
BACKLOGS = st.builds(
    Backlog, COUNTS, st.integers(0, 30), COUNTS, st.floats(0, 2000), st.none() | st.floats(0, 7200)
)


@given(BACKLOGS, TARGETS)
def test_it_is_at_least_what_is_in_hand_and_at_most_what_can_run(backlog: Backlog, target: int) -> None:
    slots = backlog.slots(target)
    assert backlog.unacked <= slots <= max(1, backlog.ready + backlog.unacked)
    assert (slots == 0) == (backlog.ready == backlog.unacked == backlog.unfed == 0)


@given(BACKLOGS, TARGETS, COUNTS)
def test_more_work_or_less_time_never_takes_fewer(backlog: Backlog, target: int, more: int) -> None:
    slots = backlog.slots(target)
    assert backlog.slots(max(0, target - more)) >= slots
    assert replace(backlog, ready=backlog.ready + more).slots(target) >= slots
    assert replace(backlog, unfed=backlog.unfed + more).slots(target) >= slots
    assert replace(backlog, oldest=backlog.oldest + more).slots(target) >= slots
    if backlog.seconds is not None:
        assert replace(backlog, seconds=backlog.seconds + more).slots(target) >= slots
        assert replace(backlog, seconds=None).slots(target) >= slots


def last_start(slots: int, backlog: Backlog, seconds: int) -> Fraction:
    """When the last waiting task starts, if the tasks in hand end one after the other, evenly."""
    free = [Fraction(seconds * (number + 1), backlog.unacked) for number in range(backlog.unacked)]
    free += [Fraction(0)] * (slots - backlog.unacked)
    heapq.heapify(free)
    start = Fraction(0)
    for _ in range(backlog.ready):
        start = heapq.heappop(free)
        heapq.heappush(free, start + seconds)
    return start


@given(st.integers(1, 300), st.integers(0, 30), SECONDS, TARGETS)
def test_every_task_starts_in_time_and_one_slot_less_would_not_do(
    ready: int, unacked: int, seconds: int, target: int
) -> None:
    backlog = Backlog(ready, unacked, seconds=seconds)
    slots = backlog.slots(target)
    assert last_start(slots, backlog, seconds) <= target
    if slots > max(unacked, 1):
        assert last_start(slots - 1, backlog, seconds) > target


@given(st.integers(1, 300), st.integers(0, 30), st.integers(1, 600))
def test_a_wait_twice_as_long_as_the_target_halves_the_target(ready: int, unacked: int, target: int) -> None:
    late = Backlog(ready, unacked, oldest=2.0 * target, seconds=10)
    assume(target % 2 == 0)
    assert late.slots(target) == replace(late, oldest=0).slots(target / 2)


# What is read.


def lanes(task_type: str = "ocr", **values: Any) -> tuple[QueueFigures, ...]:
    """The three lanes of a type; the values are those of the normal lane, and the others hold nothing."""
    empty = {"ready": 0, "unacked": 0, "oldest_seconds": 0.0}
    return tuple(
        QueueFigures(task_type=task_type, priority=lane, **empty | (values if lane == "normal" else {}))
        for lane in PRIORITIES
    )


def stats(queues: tuple[QueueFigures, ...] | None, **more: Any) -> Stats:
    known: dict[str, Any] = {"unfed_tasks": {}, "task_seconds": {"ocr": 2.0}, "retry_messages": {"5s": 0}}
    workers = (TypeWorkers(task_type="ocr", idle=1, busy=2, slots=3, with_tasks=2),)
    return Stats(at=NOW, queues=queues, **{"workers": workers, **known, **more})


def test_the_demand_of_a_type_comes_from_its_lanes_its_batches_and_what_its_tasks_take() -> None:
    demand = demand_of(
        stats(
            lanes(ready=100, unacked=2, oldest_seconds=7.5) + lanes("ner"),
            unfed_tasks={"ocr": 900, "*": 4},
            retry_messages={"30s": 3},
        ),
        60,
    )
    ocr = demand.types["ocr"]
    # Each of the 1,000 tasks takes 2 s. In 60 s, two slots start 60 of them, and each further slot 31.
    assert ocr.workers == 2 + 31
    assert (ocr.ready, ocr.unacked, ocr.unfed, ocr.oldest_seconds) == (100, 2, 900, 7.5)
    assert (ocr.task_seconds, ocr.work_seconds, ocr.slots) == (2.0, 2000.0, 1.0)
    assert demand.types["ner"].workers == 0
    assert (demand.at, demand.target_wait, demand.unfed_any_type, demand.retry_messages) == (
        NOW,
        60,
        4,
        {"30s": 3},
    )
    assert demand.unknown == {}


@pytest.mark.parametrize(
    ("workers", "wanted"),
    [
        (TypeWorkers(task_type="ocr", busy=2, slots=8, with_tasks=2), 3),
        (TypeWorkers(task_type="ocr", busy=7, slots=28, with_tasks=7), 7),
        (TypeWorkers(task_type="ocr", idle=2), 10),
    ],
    ids=["slots", "each with one task in hand", "of a version that does not tell its slots"],
)
def test_a_worker_with_several_slots_counts_for_as_many(workers: TypeWorkers, wanted: int) -> None:
    queues = lanes(ready=3, unacked=7)
    assert demand_of(stats(queues, workers=(workers,)), 0).types["ocr"].workers == wanted


@pytest.mark.parametrize(
    ("lost", "reason"),
    [({"ready": None}, "ready is unknown"), ({"unacked": None}, "unacked is unknown")],
    ids=["RabbitMQ", "heartbeats"],
)
def test_an_unknown_count_makes_no_number_of_workers(lost: Mapping[str, None], reason: str) -> None:
    queues = lanes(**{"ready": 5, "unacked": 3} | lost) + lanes("ner", ready=1)
    demand = demand_of(stats(queues))
    assert demand.types["ocr"].workers is None
    assert demand.unknown["types.ocr.workers"] == reason
    assert demand.types["ner"].workers == 1


def test_what_only_refines_the_demand_may_be_unknown() -> None:
    why = {
        "task_seconds": "Redis is unavailable",
        "unfed_tasks": "being counted",
        "oldest_seconds": "consumers",
    }
    found = stats(
        lanes(ready=5, unacked=3, oldest_seconds=None), task_seconds=None, unfed_tasks=None, workers=None,
        retry_messages=None, unknown=why,
    )  # fmt: skip
    demand = demand_of(found)
    ocr = demand.types["ocr"]
    assert ocr.workers == 8, "each task counts in full"
    assert (ocr.task_seconds, ocr.work_seconds, ocr.unfed, ocr.oldest_seconds, ocr.slots) == (None,) * 5
    assert demand.unknown.keys() == {"task_seconds", "unfed", "oldest_seconds", "slots", "retry_messages"}
    assert demand.unknown["unfed"] == "being counted"


def test_a_type_of_which_no_task_ended_counts_each_task_in_full() -> None:
    demand = demand_of(stats(lanes("acestep", ready=4, unacked=1)), 3600)
    assert demand.types["acestep"].workers == 5
    assert demand.types["acestep"].task_seconds is None


def test_without_figures_no_type_has_a_demand() -> None:
    demand = demand_of(Stats(unknown={"queues": "no monitor has reported lately"}))
    assert (demand.at, demand.types) == (None, {})
    assert demand.unknown["types"] == "no monitor has reported lately"
