"""When a callback is tried again, when it is given up, and who has to come back later: without a network."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.callbacks.decision import (
    JITTER,
    MAX_RETRY_AFTER,
    Again,
    Delivered,
    GivenUp,
    after_attempt,
    retry_after_seconds,
)
from inferq.consumers.callbacks.settings import SCHEDULE
from inferq.consumers.callbacks.targets import LONGEST_DELAY, SHORTEST_DELAY, Targets
from inferq.schemas import CallbackAttempt

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def attempt(status: int | None) -> CallbackAttempt:
    return CallbackAttempt(at=NOW, seconds=0.1, status=status, error=None if status else "no answer")


statuses = st.none() | st.integers(100, 599)


@given(
    earlier=st.lists(statuses, max_size=9),
    last=statuses,
    retry_after=st.none() | st.floats(0, 1e9),
    chance=st.floats(0, 1),
)
def test_every_attempt_is_followed_by_one_thing(
    earlier: list[int | None], last: int | None, retry_after: float | None, chance: float
) -> None:
    attempts = [attempt(status) for status in (*earlier, last)]
    decision = after_attempt(attempts, SCHEDULE, retry_after=retry_after, chance=chance)
    if last is not None and 200 <= last < 300:
        assert decision == Delivered()
    elif last == 410 or len(attempts) >= len(SCHEDULE):
        assert isinstance(decision, GivenUp)
        assert decision.reason
    else:
        assert isinstance(decision, Again)
        pause = SCHEDULE[len(attempts)]
        asked = min(retry_after or 0.0, MAX_RETRY_AFTER)
        assert max(pause, asked) <= decision.seconds <= max(pause, asked) * (1 + JITTER)


def test_a_receiver_that_is_gone_is_not_asked_again() -> None:
    assert isinstance(after_attempt([attempt(410)], SCHEDULE), GivenUp)


def test_the_schedule_is_the_one_that_is_promised() -> None:
    pauses = []
    attempts = [attempt(500)]
    while isinstance(decision := after_attempt(attempts, SCHEDULE), Again):
        pauses.append(decision.seconds)
        attempts.append(attempt(500))
    assert pauses == [5, 300, 1800, 7200, 18000, 36000, 36000]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("9" * 400, 999999999999),
        ("Fri, 99 Foo 2026 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


A, B = ("http", "a", 80), ("http", "b", 80)


def test_a_target_that_answers_gets_its_limit_and_one_that_hangs_a_single_place() -> None:
    targets = Targets(threads=64, limit=8, clock=lambda: 0.0)
    assert [targets.enter(A) for _ in range(2)] == [None, None]
    assert targets.enter(A) is not None  # nobody knows yet how it is
    targets.leave(A, 0.01, timed_out=False)
    assert [targets.enter(A) for _ in range(7)] == [None] * 7
    assert targets.enter(A) is not None
    targets.leave(A, 15.0, timed_out=True)
    assert targets.enter(A) is not None
    for _ in range(7):
        targets.leave(A, 15.0, timed_out=True)
    assert targets.enter(A) is None
    assert targets.enter(A) is not None
    targets.leave(A, 0.01, timed_out=False)
    assert [targets.enter(A) for _ in range(8)] == [None] * 8


def test_a_target_that_answers_slowly_leaves_threads_to_the_others() -> None:
    targets = Targets(threads=8, limit=8, slow=7.5, clock=lambda: 0.0)
    targets.enter(A)
    targets.leave(A, 7.0, timed_out=False)
    assert sum(targets.enter(A) is None for _ in range(20)) == 4
    assert targets.enter(B) is None
    for _ in range(4):
        targets.leave(A, 8.0, timed_out=False)
    assert sum(targets.enter(A) is None for _ in range(20)) == 1
    targets.leave(A, 0.1, timed_out=False)
    assert sum(targets.enter(A) is None for _ in range(20)) == 3


def test_a_place_that_was_not_used_teaches_nothing() -> None:
    targets = Targets(threads=8, limit=8, clock=lambda: 0.0)
    targets.enter(A)
    targets.leave(A, 15.0, timed_out=True)
    targets.enter(A)
    targets.leave(A, None)
    assert targets.busy == 0
    assert sum(targets.enter(A) is None for _ in range(20)) == 1


@given(
    moves=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["enter", "answer", "hang"])), max_size=300),
    threads=st.integers(2, 40),
)
def test_dead_targets_never_take_all_places(moves: list[tuple[int, str]], threads: int) -> None:
    targets = Targets(threads=threads, limit=8, clock=lambda: 0.0)
    inside: dict[int, int] = {}
    for number, move in moves:
        target = ("http", str(number), 80)
        if move == "enter":
            delay = targets.enter(target)
            if delay is None:
                inside[number] = inside.get(number, 0) + 1
            else:
                assert SHORTEST_DELAY <= delay <= LONGEST_DELAY + 1
        elif inside.get(number):
            inside[number] -= 1
            targets.leave(target, 1.0, timed_out=move == "hang")
        assert targets.busy == sum(inside.values()) <= threads
        assert all(count <= 8 for count in inside.values())
    fresh = Targets(threads=threads, limit=8)
    taken = sum(fresh.enter(("http", str(n), 80)) is None for n in range(threads * 3))
    assert taken <= max(1, threads * 3 // 4)


def test_what_is_put_aside_is_spread_as_the_target_can_take_it() -> None:
    now = 0.0
    targets = Targets(threads=64, limit=8, clock=lambda: now, chance=lambda: 0.5)
    targets.enter(A)
    targets.leave(A, 15.0, timed_out=True)
    targets.enter(A)
    delays = [targets.enter(A) for _ in range(1000)]
    assert all(delay is not None and SHORTEST_DELAY <= delay <= LONGEST_DELAY for delay in delays)
    assert len({round(delay or 0) for delay in delays[:20]}) > 10
    assert targets.enter(B) is None
