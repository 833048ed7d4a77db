"""The engine of a slot between tasks, with engine processes that only say what was done with them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferq.consumers.worker import engine_supervisor
from inferq.consumers.worker.engine_supervisor import EngineLease, EngineSupervisor, NotStarted
from inferq.consumers.worker.loaded_engines import LoadedEngines
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.settings import WorkerSettings
from inferq.schemas import EngineInfo, InstallationError, TransientFailure


class FakeProcess:
    """An engine process that loads at once, or never if it is a successor."""

    made: list[FakeProcess]
    fault: Exception | None = None
    """Why it cannot load."""

    def __init__(self, *_arguments: object, **_named: object) -> None:
        self.usable = self.alive = self.killed = self.has_answered = False
        self.worn, self.tasks, self.info = None, 0, None
        FakeProcess.made.append(self)

    def spawn(self) -> None:
        self.alive, self.tasks = True, 0

    def wait_ready(self, **_arguments: object) -> EngineInfo:
        if self.fault is not None:
            raise self.fault
        self.usable = True
        return EngineInfo(name="fake", version="1", model="none", device="cpu")

    def close(self, _seconds: float = 5.0) -> None:
        self.usable = self.alive = self.has_answered = False

    def kill(self) -> None:
        self.usable = self.alive = False
        self.killed = True


@pytest.fixture
def supervise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineSupervisor]:
    FakeProcess.made = []
    monkeypatch.setattr(engine_supervisor, "EngineProcess", FakeProcess)

    def begin(loaded_engines: LoadedEngines | None = None, **settings: object) -> EngineSupervisor:
        services = SimpleNamespace(
            settings=WorkerSettings().model_copy(update=settings),
            task_type=SimpleNamespace(name="fake"),
            metrics=WorkerMetrics(),
            loaded_engines=loaded_engines or LoadedEngines(),
            stopping=False,
        )
        return EngineSupervisor("slot", cast(Any, services))

    return begin


@pytest.fixture
def supervisor(supervise: Callable[..., EngineSupervisor]) -> EngineSupervisor:
    return supervise()


@pytest.fixture
def lazy(supervise: Callable[..., EngineSupervisor]) -> EngineSupervisor:
    return supervise(engine_load="lazy", idle_unload=60)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the supervisor, which sleeps for nothing else."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(engine_supervisor, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


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


def test_a_lazy_engine_loads_for_its_first_task_which_can_look_up_meanwhile(
    lazy: EngineSupervisor, now: list[float]
) -> None:
    lazy.restore()
    (engine,) = FakeProcess.made
    assert (lazy.usable, engine.alive) == (True, False)
    with lazy.lease() as lease:
        assert not lease.acquire()
        assert not lease.acquire(0.25)
        assert now == [1000.25]
        assert (engine.alive, lease.held) == (True, False)
        engine.has_answered = True
        assert lease.acquire(0.25)
        assert lease.held
    assert len(FakeProcess.made) == 1


def test_an_engine_that_loads_is_kept_though_its_task_is_cancelled(
    lazy: EngineSupervisor, now: list[float]
) -> None:
    with lazy.lease() as lease:
        lease.acquire()
    (engine,) = FakeProcess.made
    lazy.look()
    assert lazy.state == "loading"
    engine.has_answered = True
    lazy.look()
    assert lazy.state == "loaded"


def test_an_idle_engine_is_unloaded_and_the_next_task_loads_it_again(
    lazy: EngineSupervisor, now: list[float]
) -> None:
    (engine,) = FakeProcess.made
    with lazy.lease() as lease:
        lease.acquire()
        engine.has_answered = True
        assert lease.acquire()
        now[0] += 100
        lazy.look()
        assert engine.alive
        lease.release()
        now[0] += 100
        lazy.look()
        assert engine.alive, "a task is in hand"
    now[0] += 59
    lazy.look()
    assert engine.alive
    now[0] += 1
    lazy.look()
    assert (lazy.state, lazy.usable, engine.alive) == ("unloaded", True, False)
    assert unloads(lazy) == 1
    lazy.reload_requested.set()
    lazy.look()
    assert not lazy.reload_requested.is_set()
    with lazy.lease() as lease:
        assert not lease.acquire()
        engine.has_answered = True
        assert lease.acquire()
    assert len(FakeProcess.made) == 1, "nothing was loaded beside it"


def test_an_idle_engine_stays_by_default(supervisor: EngineSupervisor, now: list[float]) -> None:
    supervisor.restore()
    now[0] += 1e6
    supervisor.look()
    assert supervisor.engine.alive


@pytest.mark.parametrize("fault", [TransientFailure("no memory"), InstallationError("no weights")])
def test_a_task_whose_engine_does_not_load_does_not_start(
    lazy: EngineSupervisor, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    (engine,) = FakeProcess.made
    monkeypatch.setattr(FakeProcess, "fault", fault)
    with lazy.lease() as lease:
        assert not lease.acquire()
        engine.has_answered = True
        with pytest.raises(NotStarted):
            lease.acquire()
    assert (lazy.ready, lazy.usable, engine.killed) == (False, False, True)
    monkeypatch.setattr(FakeProcess, "fault", None)
    if isinstance(fault, InstallationError):
        with pytest.raises(InstallationError):
            lazy.restore()
        return
    lazy.restore()
    assert (lazy.ready, lazy.state) == (True, "loaded")


def test_a_load_that_takes_too_long_ends(lazy: EngineSupervisor, now: list[float]) -> None:
    with lazy.lease() as lease:
        assert not lease.acquire(600)
        with pytest.raises(NotStarted):
            lease.acquire(1)
    assert FakeProcess.made[0].killed


def test_two_engines_of_which_one_may_be_loaded_take_turns(
    supervise: Callable[..., EngineSupervisor], now: list[float]
) -> None:
    limit = LoadedEngines(1, lambda: now[0])
    one, other = supervise(limit), supervise(limit)
    assert (one.ready, other.ready) == (True, True), "they load for their first tasks"
    with one.lease() as lease, other.lease() as waits:
        assert loads(lease)
        assert not waits.acquire()
        now[0] += 100
        assert not waits.acquire()
        assert one.state == "loaded", "it computes"
        lease.release()
        with one.lease() as behind:
            assert not behind.acquire(), "the turn of its engine is over"
            assert unloads(one, "room") == 1
            assert loads(waits)
            now[0] += 100
            assert not behind.acquire()
            waits.release()
            assert loads(behind)
    assert (one.state, other.state) == ("loaded", "unloaded")
    assert unloads(other, "room") == 1


def test_an_engine_whose_task_has_just_been_computed_is_not_idle(
    supervise: Callable[..., EngineSupervisor], now: list[float]
) -> None:
    limit = LoadedEngines(1, lambda: now[0])
    one, other = supervise(limit), supervise(limit)
    with one.lease() as lease, other.lease() as waits:
        lease.acquire()
        now[0] += 100
        assert loads(lease), "after 100 s, for which its turn lasts"
        with lease.computing():
            now[0] += 10
        lease.release()
        assert not waits.acquire()
        assert one.state == "loaded", "its next task may be on the way"
        now[0] += 1
        assert loads(waits), "none came while its result was stored"


def test_a_task_that_fetches_its_input_keeps_no_other_engine_from_loading(
    supervise: Callable[..., EngineSupervisor], now: list[float]
) -> None:
    limit = LoadedEngines(1, lambda: now[0])
    one, fetching, third = supervise(limit), supervise(limit), supervise(limit)
    with one.lease() as lease, fetching.lease() as first, third.lease() as second:
        assert loads(lease)
        assert not first.acquire()
        first.step_aside()
        assert not second.acquire()
        now[0] += 100
        lease.release()
        assert loads(second)


def test_a_task_that_is_cancelled_while_it_waits_for_room_keeps_no_other_engine_from_loading(
    supervise: Callable[..., EngineSupervisor], now: list[float]
) -> None:
    limit = LoadedEngines(1, lambda: now[0])
    one, cancelled, third = supervise(limit), supervise(limit), supervise(limit)
    with one.lease() as lease, third.lease() as waits:
        assert loads(lease)
        with cancelled.lease() as gone:
            assert not gone.acquire()
        now[0] += 100
        lease.release()
        assert loads(waits)


def test_an_engine_that_does_not_load_makes_room(
    supervise: Callable[..., EngineSupervisor], monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    limit = LoadedEngines(1, lambda: now[0])
    broken, other = supervise(limit), supervise(limit)
    with broken.lease() as lease, other.lease() as waits:
        lease.acquire()
        assert not waits.acquire()
        with monkeypatch.context() as patched, pytest.raises(NotStarted):
            patched.setattr(FakeProcess, "fault", TransientFailure("no memory"))
            loads(lease)
        assert loads(waits)


@pytest.mark.parametrize("due", ["reload", "max_tasks"])
def test_where_the_number_is_limited_an_engine_ends_before_the_next_one_loads(
    supervise: Callable[..., EngineSupervisor], now: list[float], due: str
) -> None:
    supervisor = supervise(LoadedEngines(1, lambda: now[0]), engine_max_tasks=3)
    with supervisor.lease() as lease:
        assert loads(lease)
    if due == "reload":
        supervisor.reload_requested.set()
    else:
        supervisor.engine.tasks = 3
    supervisor.look()
    assert (supervisor.state, len(FakeProcess.made)) == ("unloaded", 1)
    assert unloads(supervisor, due) == 1
    supervisor.look()
    assert supervisor.state == "unloaded", "no task needs it"


def loads(lease: EngineLease) -> bool:
    """Have the engine loaded for the task, unless another one is; gives whether the task holds it."""
    if not lease.acquire() and lease.engine.alive:
        cast(Any, lease.engine).has_answered = True
    return lease.acquire()


def unloads(supervisor: EngineSupervisor, reason: str = "idle") -> float | None:
    return cast(Any, supervisor)._services.metrics.registry.get_sample_value(
        "inferq_engine_unloads_total", {"reason": reason}
    )  # type: ignore[no-any-return]
