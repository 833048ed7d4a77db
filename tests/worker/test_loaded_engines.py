"""How engines share the room for a few: who is loaded, who waits, and who makes room."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inferq.consumers.worker.loaded_engines import EngineRoom, LoadedEngines

LOAD_SECONDS = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """An engine that unloads at once, unless it computes."""

    def __init__(self, engines: LoadedEngines) -> None:
        self.loaded = self.computes = False
        self.room: EngineRoom = engines.add(self.make_room)

    def make_room(self) -> bool:
        if self.computes or not self.loaded:
            return False
        self.unload()
        return True

    def load(self, seconds: float = LOAD_SECONDS) -> bool:
        if self.room.ask():
            self.loaded = True
            self.room.note_loaded(seconds)
        return self.loaded

    def unload(self) -> None:
        self.loaded = False
        self.room.leave()


def engines(count: int, most: int) -> tuple[Clock, list[Engine]]:
    clock = Clock()
    limit = LoadedEngines(most, clock)
    return clock, [Engine(limit) for _ in range(count)]


def test_without_a_limit_every_engine_is_loaded_at_once() -> None:
    limit = LoadedEngines()
    rooms = [limit.add(lambda: False) for _ in range(20)]
    assert all(room.ask() for room in rooms)
    assert not limit.limited
    assert not any(room.must_yield() for room in rooms)


def test_the_least_recently_used_idle_engine_makes_room() -> None:
    clock, (first, second, third) = engines(3, most=2)
    assert first.load()
    clock.now += 1
    assert second.load()
    clock.now += 1
    first.room.used_at = clock.now
    clock.now += 1
    assert third.load()
    assert (first.loaded, second.loaded) == (True, False)


def test_an_engine_between_two_tasks_of_its_turn_stays() -> None:
    clock, (first, second) = engines(2, most=1)
    assert first.load()
    first.room.used_at = clock.now = clock.now + 1
    assert not second.load()
    clock.now += 0.3  # no task came
    assert second.load()


def test_an_engine_that_computes_is_never_unloaded_and_yields_once_its_turn_is_over() -> None:
    clock, (first, second) = engines(2, most=1)
    assert first.load()
    first.computes = True
    clock.now += 100
    assert not second.load()
    assert first.loaded
    first.computes, first.room.used_at = False, clock.now
    assert first.room.must_yield()
    first.unload()
    assert not first.load(), "it waits behind the other one now"
    assert second.load()


def test_an_engine_whose_turn_is_not_over_goes_on_with_its_tasks() -> None:
    clock, (first, second) = engines(2, most=1)
    first.load(10)
    first.computes = True
    assert not second.load()
    clock.now += 9
    assert not first.room.must_yield()
    clock.now += 1
    assert first.room.must_yield()


def test_one_that_waits_makes_one_engine_yield_not_two() -> None:
    clock, (first, second, third) = engines(3, most=2)
    for engine in (first, second):
        engine.load()
        engine.computes = True
    clock.now += 100
    assert not first.room.must_yield(), "nobody waits"
    assert not third.load()
    assert first.room.must_yield()
    assert not second.room.must_yield()
    first.unload()
    assert not second.room.must_yield()
    assert third.load()


def test_one_that_waits_no_more_keeps_no_other_from_its_turn() -> None:
    clock, (first, second, third) = engines(3, most=1)
    first.load()
    first.computes = True
    clock.now += 100
    assert not second.load()
    assert not third.load()
    second.room.withdraw()
    first.computes = False
    assert third.load()


class Sharing(RuleBasedStateMachine):
    """Engines whose tasks come and go: each is asked for again and again, as tasks that wait do."""

    @initialize(most=st.integers(1, 3))
    def begin(self, most: int) -> None:
        self.most = most
        self.clock, self.engines = engines(4, most)
        self.tasks = [0] * 4
        self.overtaken: dict[int, int] = {}
        """For each engine that waits: how often another one began to load since."""

    def _step(self, which: int) -> None:
        """What an engine's thread does before a task: yield, ask, compute."""
        engine = self.engines[which]
        if engine.loaded and engine.room.must_yield():
            engine.unload()
        if not engine.loaded:
            before = [other.loaded for other in self.engines]
            used = [other.room.used_at for other in self.engines]
            if not engine.load():
                self.overtaken.setdefault(which, 0)
                return
            made_room = [n for n in range(4) if before[n] and not self.engines[n].loaded]
            assert len(made_room) <= 1
            for victim in made_room:
                spared = [
                    n for n in range(4) if self.engines[n].loaded and n != which and self._dispensable(n)
                ]
                assert all(used[victim] <= used[n] for n in spared)
            assert self.overtaken.pop(which, 0) < 4 * 2
            for other in self.overtaken:
                self.overtaken[other] += 1
        engine.computes = True

    def _dispensable(self, which: int) -> bool:
        room, now = self.engines[which].room, self.clock.now
        return not self.engines[which].computes and (room.is_over(now) or room.is_idle(now))

    @rule(which=st.integers(0, 3))
    def a_task_comes(self, which: int) -> None:
        self.tasks[which] += 1
        if not self.engines[which].computes:
            self._step(which)

    @rule(which=st.integers(0, 3), another=st.booleans())
    def a_task_ends(self, which: int, another: bool) -> None:
        engine = self.engines[which]
        if not engine.computes:
            return
        engine.computes, engine.room.used_at = False, self.clock.now
        self.tasks[which] += another - 1
        self._look_again()

    @rule(which=st.integers(0, 3))
    def the_tasks_that_wait_are_cancelled(self, which: int) -> None:
        if not self.engines[which].computes:
            self.tasks[which] = 0
            self.engines[which].room.withdraw()
            self.overtaken.pop(which, None)

    @rule(seconds=st.sampled_from([0.1, 1.0, LOAD_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self._look_again()

    def _look_again(self) -> None:
        for which, engine in enumerate(self.engines):
            if self.tasks[which] and not engine.computes:
                self._step(which)

    @precondition(lambda self: any(self.tasks))
    @rule()
    def everybody_has_a_turn_in_the_end(self) -> None:
        """No engine waits for ever, though the tasks of the others keep coming."""
        waiting = {n for n in range(4) if self.tasks[n]}
        for _ in range(2 * 4 + 2):
            computing = {n for n in range(4) if self.engines[n].computes}
            waiting -= computing
            self.clock.now += LOAD_SECONDS
            for which in computing:
                engine = self.engines[which]
                engine.computes, engine.room.used_at = False, self.clock.now
                self._step(which)  # its next task is there already
            self._look_again()
        assert not waiting

    @invariant()
    def never_more_are_loaded(self) -> None:
        if hasattr(self, "most"):
            assert sum(engine.loaded for engine in self.engines) <= self.most
            assert all(engine.loaded for engine in self.engines if engine.computes)


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40)
