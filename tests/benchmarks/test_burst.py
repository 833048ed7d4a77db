"""The burst on paper: that tasks and pods follow their rules, and that the page has its figures."""

from __future__ import annotations

import pytest

from benchmarks import burst
from benchmarks.burst import BEGIN, BURST, CALM, END, HOUR, MOST, RULES, TASK_SECONDS, Pod, Run, Seen


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [burst.simulate(rule) for rule in RULES]


def test_the_page_and_the_picture_are_those_of_the_simulation(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict(zip(RULES, runs, strict=True))
    monkeypatch.setattr(burst, "simulate", found.__getitem__)
    for path, text in burst.files().items():
        assert path.read_text("utf-8") == text, f"{path.name} is stale; run: python -m benchmarks.burst"


def test_each_task_runs_once_whatever_the_rule(runs: list[Run]) -> None:
    tasks = burst.arrivals()
    assert [run.ended for run in runs] == [len(tasks)] * len(RULES)
    in_burst = [came for came, _ in tasks if BEGIN <= came < END]
    assert len(in_burst) == pytest.approx(BURST * (END - BEGIN), rel=0.01)
    assert len(tasks) - len(in_burst) == pytest.approx(CALM * (HOUR - END + BEGIN), rel=0.02)
    assert sum(seconds for _, seconds in tasks) / len(tasks) == pytest.approx(TASK_SECONDS, rel=0.01)
    for run in runs:
        assert [came for came, _ in run.waits] == in_burst
        assert min(wait for _, wait in run.waits) >= 0


def test_a_fleet_waits_as_its_capacity_says(runs: list[Run]) -> None:
    peak, small = runs[:2]
    assert peak.wait(99) < 0.1
    assert (peak.pods, small.pods) == ([MOST] * HOUR, [3] * HOUR)
    # What came beyond 3 pods' capacity waits at the end of the burst, and is done beside the calm load.
    capacity = 3 / TASK_SECONDS
    backlog = (BURST - capacity) * (END - BEGIN)
    assert max(wait for _, wait in small.waits) == pytest.approx(backlog / capacity, rel=0.03)


def test_the_pods_grow_and_shrink_as_the_autoscaler_may(runs: list[Run]) -> None:
    for run in runs:
        for before, after in zip(run.pods, run.pods[1:], strict=False):
            limit = max(2 * before, before + 8) if run.rule.doubles else MOST
            assert run.rule.least <= after <= min(MOST, max(limit, before)), run.rule.name
        assert run.pods[-1] <= max(run.rule.least, 3)
    scaled = next(run for run in runs if run.rule.scaled)
    full = scaled.pods.index(MOST)
    assert all(pods == MOST for pods in scaled.pods[full : END + burst.STABLE_SECONDS])


def test_demand_in_seconds_starts_what_waits_within_its_target() -> None:
    wish = burst.demand(30)
    assert wish(0, Seen()) == 0
    assert wish(0, Seen(waiting=1, in_hand=0)) == 1
    most = 30 / TASK_SECONDS  # what one pod can start in the target
    assert wish(0, Seen(waiting=round(10 * most), in_hand=0)) == pytest.approx(10, abs=1)
    assert wish(0, Seen(waiting=round(10 * most), in_hand=0, oldest=60.0)) == pytest.approx(20, abs=1)
    assert wish(0, Seen(waiting=5, in_hand=3)) == 3


def test_of_several_pods_those_that_are_not_ready_end_first_and_then_idle_ones() -> None:
    busy, idle, starting = Pod(9.5, 0.0), Pod(3.0, 0.0), Pod(100.0, 100.0)
    for wanted, left in ((2, [idle, busy]), (1, [busy])):
        pods = [busy, idle, starting]
        burst._resize(pods, wanted, now=9, start=10.0)
        assert pods == left
    burst._resize(pods, 2, now=9, start=10.0)
    assert pods == [busy, Pod(19.0, 19.0)]
