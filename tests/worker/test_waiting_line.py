"""First come, first served: who may hold a waiting line."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from inferq.consumers.worker.waiting_line import Place, WaitingLine


def test_a_place_that_has_not_asked_yet_is_not_overtaken() -> None:
    line = WaitingLine()
    with line.enter() as first, line.enter() as second:
        assert not second.acquire()
        assert first.acquire()
        assert not second.acquire()
        first.release()
        assert second.acquire()


def test_a_place_that_steps_aside_keeps_its_turn() -> None:
    line = WaitingLine()
    with line.enter() as first, line.enter() as second, line.enter() as third:
        first.step_aside()
        assert second.acquire()
        assert not first.acquire()
        second.release()
        assert not third.acquire()
        assert first.acquire()


def test_one_that_wants_to_be_alone_waits_until_the_others_have_finished() -> None:
    line = WaitingLine()
    with line.enter() as first, line.enter() as second, line.enter() as third:
        assert first.acquire()
        first.release()
        assert not second.acquire(alone=True), "what the first one computed is not stored yet"
        assert not third.acquire(), "it is not overtaken meanwhile"
        first.finish()
        assert second.acquire(alone=True)


def test_the_line_is_held_first_by_those_who_maintain_it() -> None:
    line = WaitingLine()
    maintained = threading.Event()
    with line.enter() as first, line.enter() as second:
        assert first.acquire()

        def maintain() -> None:
            with line.hold_first():
                maintained.set()

        thread = threading.Thread(target=maintain)
        thread.start()
        assert not maintained.is_set()
        first.release()
        assert second.acquire(30)
        assert maintained.is_set()
        thread.join()


def test_an_idle_line_is_one_that_nobody_holds_or_waits_for() -> None:
    line = WaitingLine()
    with line.hold_if_idle() as held:
        assert held
        with line.enter() as place:
            assert not place.acquire()
    with line.enter() as place:
        with line.hold_if_idle() as held:
            assert not held
        assert place.acquire()
        with line.hold_if_idle() as held:
            assert not held
        place.release()
        with line.hold_if_idle() as held:
            assert held


def test_those_who_wait_for_somebody_to_come_are_woken() -> None:
    line = WaitingLine()
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(line.wait_occupied(60)))
    thread.start()
    with line.enter():
        thread.join()
    assert seen == [True]
    assert not line.wait_occupied(0)


class Line(RuleBasedStateMachine):
    """The line against a list: whatever is asked in whatever order, the first that waits comes first."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.line = WaitingLine()
        self.exits: dict[Place, ExitStack] = {}
        self.waiting: list[Place] = []
        self.order: list[Place] = []
        self.holder: Place | None = None
        self.unfinished: set[Place] = set()

    @rule(target=places)
    def enter(self) -> Place:
        stack = ExitStack()
        place = stack.enter_context(self.line.enter())
        self.exits[place] = stack
        self.order.append(place)
        self.waiting.append(place)
        return place

    @rule(place=places, alone=st.booleans())
    def acquire(self, place: Place, alone: bool) -> None:
        expected = self.holder is place
        if not expected:
            if place not in self.waiting:
                self.waiting.append(place)
            first = next(p for p in self.order if p in self.waiting)
            expected = self.holder is None and first is place
            if alone:
                expected = expected and not self.unfinished - {place}
        assert place.acquire(alone=alone) == expected
        if expected:
            self.holder = place
            self.unfinished.add(place)
            self.waiting = [p for p in self.waiting if p is not place]

    @rule(place=places)
    def finish(self, place: Place) -> None:
        place.finish()
        self.unfinished.discard(place)

    @rule(place=places)
    def step_aside(self, place: Place) -> None:
        place.step_aside()
        self.waiting = [p for p in self.waiting if p is not place]

    @rule(place=places)
    def release(self, place: Place) -> None:
        place.release()
        self.waiting = [p for p in self.waiting if p is not place]
        if self.holder is place:
            self.holder = None

    @rule(place=consumes(places))
    def leave(self, place: Place) -> None:
        self.exits.pop(place).close()
        self.order.remove(place)
        self.unfinished.discard(place)
        self.waiting = [p for p in self.waiting if p is not place]
        if self.holder is place:
            self.holder = None

    @invariant()
    def one_at_a_time(self) -> None:
        assert [place for place in self.order if place.holds] == ([self.holder] if self.holder else [])
        assert len(self.line) == len(self.order)
        with self.line.hold_if_idle() as idle:
            assert idle == (self.holder is None and not self.waiting)


TestLine = Line.TestCase
