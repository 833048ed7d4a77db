"""The engine of a slot between tasks, with engine processes that only say what was done with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferq.consumers.worker import engine_supervisor
from inferq.consumers.worker.engine_supervisor import EngineSupervisor
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.schemas import EngineInfo


class FakeProcess:
    """An engine process that loads at once, or never if it is a successor."""

    made: list[FakeProcess]

    def __init__(self, *_arguments: object, **_named: object) -> None:
        self.usable = self.alive = self.killed = self.has_answered = False
        self.worn, self.tasks, self.info = None, 0, None
        FakeProcess.made.append(self)

    def spawn(self) -> None:
        self.alive = True

    def wait_ready(self, **_arguments: object) -> EngineInfo:
        self.usable = True
        return EngineInfo(name="fake", version="1", model="none", device="cpu")

    def close(self) -> None:
        self.usable = self.alive = False

    def kill(self) -> None:
        self.usable = self.alive = False
        self.killed = True


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> EngineSupervisor:
    FakeProcess.made = []
    monkeypatch.setattr(engine_supervisor, "EngineProcess", FakeProcess)
    settings = SimpleNamespace(
        engine_memory_limit=None, engine_recycle_memory=None, engine_max_tasks=None, start_limit=600
    )
    services = SimpleNamespace(
        settings=settings, task_type=SimpleNamespace(name="fake"), metrics=WorkerMetrics(), stopping=False
    )
    return EngineSupervisor("slot", cast(Any, services))


def test_an_engine_is_not_loaded_beside_a_successor_of_the_one_that_died(
    supervisor: EngineSupervisor,
) -> None:
    supervisor.restore()
    supervisor.reload_requested.set()
    supervisor.look()
    first, successor = FakeProcess.made
    first.kill()
    supervisor.restore()
    assert successor.killed
    assert supervisor.engine is first
    assert supervisor.usable


def test_a_second_reload_replaces_the_successor_of_the_first(supervisor: EngineSupervisor) -> None:
    supervisor.restore()
    for _ in range(2):
        supervisor.reload_requested.set()
        supervisor.look()
    engine, first, second = FakeProcess.made
    assert (first.killed, second.killed) == (True, False)
    second.has_answered = True
    supervisor.look()
    assert supervisor.engine is second
    assert not engine.usable


def test_a_task_moves_the_clock_of_its_engine_and_a_dead_engine_stops_it(
    supervisor: EngineSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(supervisor.clock, "_clock", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    after(100)
    supervisor.restore()
    after(8)
    with supervisor.lease() as lease:
        after(4)
        with lease.computing():
            after(2)
        lease.release()
        after(1)
    assert supervisor.clock.seconds() == {"task": 8, "input": 4, "computing": 2, "result": 1}
    with supervisor.lease() as lease, lease.computing():
        after(16)
        lease.engine.kill()
    after(100)
    assert supervisor.clock.seconds() == {"task": 8, "input": 4, "computing": 18, "result": 1}
    assert (
        cast(Any, supervisor)._services.metrics.registry.get_sample_value(
            "inferq_engine_waiting_seconds_total", {"task_type": "fake", "for": "input"}
        )
        == 4
    )


def test_the_clock_goes_on_with_the_successor_of_an_engine_that_died_in_its_last_run(
    supervisor: EngineSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(supervisor.clock, "_clock", lambda: now[0])
    supervisor.restore()
    supervisor.reload_requested.set()
    supervisor.look()
    _, successor = FakeProcess.made
    with supervisor.lease() as lease, lease.computing():
        lease.engine.kill()
    successor.has_answered = True
    supervisor.look()
    assert supervisor.engine is successor
    now[0] += 5
    assert supervisor.clock.seconds()["task"] == 5
