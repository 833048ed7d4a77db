"""How long the first message of a queue has waited, from counts alone."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.monitor.waiting import MOST_ARRIVALS, Waiting


def test_the_first_message_is_as_old_as_its_arrival() -> None:
    queue = Waiting()
    assert queue.look(0, 0, 100) == 0  # workers took 100 before
    assert queue.look(5, 2, 100) == 0  # seen now
    assert queue.look(10, 5, 100) == 5
    assert queue.look(15, 4, 101) == 10  # one of the two that came first was taken
    assert queue.look(20, 3, 102) == 10  # both were: the next came at 10
    assert queue.look(25, 0, 105) == 0


def test_a_queue_that_never_empties_does_not_grow_old() -> None:
    queue = Waiting()
    # Half of the messages arrive and are taken between two looks.
    ages = [queue.look(now, 100, 10 * now) for now in range(0, 200, 5)]
    assert ages[:2] == [0, 5]
    assert set(ages[2:]) == {5}


def test_what_waits_at_the_first_look_counts_from_then() -> None:
    queue = Waiting()
    assert queue.look(1000, 7, 50) == 0
    assert queue.look(1060, 7, 50) == 60


def test_the_next_monitor_goes_on() -> None:
    first = Waiting()
    first.look(0, 1, 0)
    first.look(5, 3, 0)
    next_one = Waiting(first.known())
    assert next_one.look(100, 3, 0) == 100
    assert next_one.look(105, 2, 1) == 100
    assert Waiting().known() is None


def test_a_purge_takes_the_oldest() -> None:
    queue = Waiting()
    queue.look(0, 10, 0)
    assert queue.look(5, 20, 0) == 5
    assert queue.look(10, 5, 0) == 5  # 15 left uncounted
    assert queue.look(15, 6, 0) == 10
    assert queue.look(20, 1, 5) == 5  # the one that came at 15


def test_a_count_that_lags_hides_nothing_and_adds_nothing() -> None:
    queue = Waiting()
    queue.look(0, 100, 0)
    assert queue.look(5, 50, 20) == 5  # 30 more were taken, and not counted yet
    assert queue.look(10, 50, 50) == 10
    assert queue.look(15, 1, 99) == 15  # the last of the first 100
    queue = Waiting()
    queue.look(0, 100, 0)
    assert queue.look(5, 60, 20) == 5  # 50 taken, 10 arrived
    assert queue.look(10, 60, 50) == 10
    assert queue.look(15, 10, 100) == 5  # the first 100 are gone; the others were seen at 10


def test_counts_that_begin_anew_change_no_age() -> None:
    queue = Waiting()
    queue.look(0, 10, 1000)
    assert queue.look(5, 10, 0) == 5
    assert queue.look(10, 8, 2) == 10
    assert queue.look(15, 12, 2) == 15
    assert queue.look(20, 4, 10) == 5


def test_a_clock_that_was_set_back_gives_no_negative_age() -> None:
    queue = Waiting()
    queue.look(100, 1, 0)
    assert queue.look(50, 1, 0) == 0


def test_a_long_backlog_takes_bounded_memory_and_stays_nearly_right() -> None:
    queue = Waiting()
    looks = 5_000
    for number in range(looks):
        age = queue.look(5.0 * number, number + 1, 0)
    assert age == 5.0 * (looks - 1)
    known = queue.known()
    assert known is not None
    assert len(known.arrivals) <= MOST_ARRIVALS
    assert sum(count for _, count in known.arrivals) == looks
    half = queue.look(5.0 * looks, looks // 2, looks // 2)
    assert 0.9 <= half / (5.0 * looks / 2) <= 1


def test_a_message_that_is_only_requeued_grows_old() -> None:
    queue = Waiting()
    queue.look(0, 0, 0)
    queue.look(5, 1, 0)
    assert queue.look(10, 0, 1) == 0  # in hand
    assert queue.look(15, 1, 1, 1) == 10
    assert queue.look(20, 1, 4, 4) == 15
    assert queue.look(25, 0, 5, 4) == 0
    assert Waiting(queue.known()).look(30, 2, 5, 5) == 25
    assert queue.look(30, 1, 5, 4) == 0  # back, and not counted yet
    assert queue.look(35, 0, 6, 5) == 0
    assert queue.look(40, 2, 6, 6) == 35  # with another
    assert queue.look(45, 1, 7, 6) == 5


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 25)), min_size=1, max_size=60))
def test_it_agrees_with_a_queue_whose_messages_are_not_requeued(steps: list[tuple[int, int]]) -> None:
    real: deque[float] = deque()
    queue, taken = Waiting(), 0
    queue.look(0, 0, 0)
    for number, (arrive, take) in enumerate(steps, start=1):
        now = 5.0 * number
        real.extend([now - 1] * arrive)  # between two looks
        for _ in range(min(take, len(real))):
            real.popleft()
            taken += 1
        age = queue.look(now, len(real), taken)
        truth = now - real[0] if real else 0.0
        assert age == (truth - 1 if real else 0.0)


@given(st.lists(st.lists(st.sampled_from(["arrive", "take", "settle", "requeue"]), max_size=12), max_size=40))
def test_it_agrees_with_a_queue_whose_worker_requeues(steps: list[list[str]]) -> None:
    real: deque[float] = deque()
    in_hand: float | None = None
    queue, taken, requeued = Waiting(), 0, 0
    queue.look(0, 0, 0)
    for number, actions in enumerate(steps, start=1):
        now = 5.0 * number
        for action in actions:
            if action == "arrive":
                real.append(now)
            elif action == "take" and real and in_hand is None:
                in_hand = real.popleft()
                taken += 1
            elif action != "take" and in_hand is not None:
                if action == "requeue":
                    real.appendleft(in_hand)
                    requeued += 1
                in_hand = None
        assert queue.look(now, len(real), taken, requeued) == (now - real[0] if real else 0.0)
