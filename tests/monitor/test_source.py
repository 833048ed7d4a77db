"""Figures of one service: what is believed, and what is unknown."""

from __future__ import annotations

import threading

from inferq.consumers.monitor.source import Reading, Source, Unknown
from inferq.storage import StatusOutage
from tests.waiting import eventually


def value(source: Source[int]) -> int:
    found = source.figures(30)
    assert isinstance(found, Reading)
    return found.figures


def test_a_reading_that_takes_long_is_used_when_it_ends_and_hides_no_earlier_figures() -> None:
    answers = [threading.Event(), threading.Event()]
    numbers = iter((1, 2))

    def read() -> int:
        number = next(numbers)
        answers[number - 1].wait(60)
        return number

    source = Source("Redis", read, keeps=60)
    source.start()
    assert source.figures() == Unknown("Redis has not been read yet")
    source.ask()
    assert source.figures(0.05) == Unknown("Redis has not been read yet"), "slow is not unavailable"
    source.ask()  # begins no second reading
    answers[0].set()
    assert value(source) == 1
    source.ask()
    found = source.figures(0.05)
    assert isinstance(found, Reading)
    assert found.figures == 1
    answers[1].set()
    assert value(source) == 2


def test_a_failure_hides_the_figures_from_before_and_no_address_is_told() -> None:
    faults: list[Exception] = []

    def read() -> int:
        if faults:
            raise faults.pop()
        return 7

    source = Source("Redis", read, keeps=60)
    source.start()
    for fault, said in (
        (
            StatusOutage("Redis at 10.0.0.1:6379 cannot be reached"),
            Unknown("Redis is unavailable", outage=True),
        ),
        (ValueError("10.0.0.1"), Unknown("Redis: the figures cannot be read; see the monitor's log")),
    ):
        source.ask()
        assert value(source) == 7
        faults.append(fault)
        source.ask()
        assert source.figures(30) == said


def test_old_figures_are_unknown() -> None:
    source = Source("the object store", lambda: 7, keeps=0.01)
    source.start()
    source.ask()
    eventually(lambda: source.figures(30) == Unknown("the figures of the object store are out of date"))
