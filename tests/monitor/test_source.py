"""Figures of one service: what is believed, and what is unknown."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest

from inferq.consumers.monitor.source import NotRead, Source, Unknown
from inferq.consumers.monitor.stats import make_stats
from inferq.storage import StatusOutage
from inferq.storage.workers import Registered
from tests.waiting import eventually


def test_a_service_that_hangs_is_unknown_until_it_answers() -> None:
    answer = threading.Event()
    source = Source("Redis", lambda: answer.wait(60), patience=0.01)
    source.start()
    with pytest.raises(NotRead, match="Redis has not been read yet"):
        source.figures()
    source.ask()
    with pytest.raises(Unknown, match="Redis does not answer"):
        source.figures(0.05)
    source.ask()  # begins no second reading
    answer.set()
    assert source.figures(30) is True


def test_a_service_is_not_called_unavailable_before_its_first_reading_has_ended() -> None:
    """It may take minutes with many batches, and an alert would fire."""
    stats = make_stats(
        at=datetime.now(UTC),
        task_types=(),
        broker=Unknown("RabbitMQ is unavailable"),
        workers=Registered((), {}),
        given_up=0,
        records=NotRead("the object store has not been read yet"),
        oldest={},
    )
    assert stats.services == {"rabbitmq": False, "redis": True}
    assert stats.unknown["batches"] == "the object store has not been read yet"


def test_a_failure_hides_the_figures_from_before_and_no_address_is_told() -> None:
    faults: list[Exception] = []

    def read() -> int:
        if faults:
            raise faults.pop()
        return 7

    source = Source("Redis", read, patience=30)
    source.start()
    for fault, said in (
        (StatusOutage("Redis at 10.0.0.1:6379 cannot be reached"), "Redis is unavailable"),
        (ValueError("10.0.0.1"), "Redis: the figures cannot be read; see the monitor's log"),
    ):
        source.ask()
        assert source.figures(30) == 7
        faults.append(fault)
        source.ask()
        with pytest.raises(Unknown) as unknown:
            source.figures(30)
        assert str(unknown.value) == said


def test_old_figures_are_unknown() -> None:
    source = Source("the object store", lambda: 7, patience=30, keeps=0.01)
    source.start()
    source.ask()

    def lately() -> bool:
        try:
            source.figures(30)
        except Unknown as unknown:
            return "out of date" in str(unknown)
        return False

    assert eventually(lately)
