"""Object store reads that submissions can do without."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from inferq.producer.gateway.breaker import StoreBreaker
from inferq.producer.gateway.threads import Threads
from inferq.storage.objects.store import ObjectNotFound, StoreOutage


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    """A read that ends with the test."""
    released = threading.Event()
    yield lambda: released.wait(20) and None
    released.set()


async def test_a_slow_read_stops_all_others_until_one_is_quick_again(
    clock: Clock, hang: Callable[[], None]
) -> None:
    breaker = StoreBreaker(limit=0.5, pause=10, clock=clock)
    threads = Threads(4, name="store", seconds=20, outage=StoreOutage)
    reads: list[str] = []

    def read() -> str:
        reads.append("read")
        return "found"

    assert await breaker.run(read, threads) == "found"
    with pytest.raises(StoreOutage, match="too slow"):
        await breaker.run(hang, threads)
    for clock.seconds in (0.0, 9.9):
        with pytest.raises(StoreOutage, match="too slow"):
            await breaker.run(read, threads)
    assert reads == ["read"]
    clock.seconds = 10.0
    with pytest.raises(StoreOutage, match="too slow"):  # the one that is let through is slow again
        await breaker.run(hang, threads)
    clock.seconds = 19.9
    with pytest.raises(StoreOutage, match="too slow"):
        await breaker.run(read, threads)
    clock.seconds = 20.0
    assert await breaker.run(read, threads) == "found"
    assert await breaker.run(read, threads) == "found"


async def test_a_read_that_fails_in_time_is_no_slow_one(clock: Clock, hang: Callable[[], None]) -> None:
    breaker = StoreBreaker(limit=0.5, pause=10, clock=clock)
    threads = Threads(4, name="store", seconds=20, outage=StoreOutage)

    def missing() -> None:
        raise ObjectNotFound("missing")

    with pytest.raises(StoreOutage):
        await breaker.run(hang, threads)
    clock.seconds = 10.0
    for _ in range(2):
        with pytest.raises(ObjectNotFound):
            await breaker.run(missing, threads)
