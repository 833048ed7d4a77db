"""Three priorities served strictly by two workers, each a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from inferq.schemas import Priority, Result
from tests.waiting import eventually
from tests.worker.conftest import Site


def publish(site: Site, priority: Priority, delay: float) -> str:
    task = {"task_type": "echo", "priority": priority, "delay": delay}
    return site.publish(task, key=f"task_type.echo.{priority}")


def started(site: Site, task_ids: Sequence[str]) -> list[Result]:
    """The results, by when their runs began."""
    return sorted((site.ended(task_id) for task_id in task_ids), key=_start)


def _start(result: Result) -> datetime:
    assert result.started_at is not None
    return result.started_at


def unharmed(site: Site, results: Sequence[Result]) -> None:
    """Giving back burnt no attempt, and made no task pass for poison."""
    assert {(result.status, result.attempts) for result in results} == {("succeeded", 1)}
    assert site.dead("echo") == []


def test_a_high_task_overtakes_two_hundred_low_ones(site: Site) -> None:
    low = [publish(site, "low", 0.05) for _ in range(200)]
    for _ in range(2):
        site.worker("echo", INFERQ_BATCH_SIZE="1")
    eventually(lambda: site.depth("inference.echo.low") < 190)
    for _ in range(3):
        high = publish(site, "high", 0)
        published = datetime.now(UTC)  # the broker has it: before that, nothing is there to be overtaken
        urgent = site.ended(high)
        before = [
            r for r in (site.results.load("default", i) for i in low)
            if r is not None and published < _start(r) < _start(urgent)
        ]  # fmt: skip
        # Each worker may have had its next one on the way already.
        assert len(before) <= 2, "low tasks started before a high one that was waiting"
        assert site.depth("inference.echo.low") > 20, "there was no backlog left to overtake"
    unharmed(site, started(site, low))


def test_groups_of_low_tasks_give_way_to_a_high_one_between_two_batches(site: Site) -> None:
    low = [publish(site, "low", 0.05) for _ in range(200)]  # a delay has no company in its batch
    site.worker("echo")
    eventually(lambda: site.depth("inference.echo.low") <= 140)  # two groups in hand
    high = publish(site, "high", 0)
    published = datetime.now(UTC)
    urgent = site.ended(high)
    ended = [r for r in (site.results.load("default", i) for i in low) if r is not None]
    before = [r for r in ended if published < r.finished_at < _start(urgent)]
    # The group that was computed is recorded as a whole, and the one that waited for the engine has given way.
    assert len(before) < 56, "two groups of low tasks came before a high one that was waiting"
    unharmed(site, started(site, low))


def test_two_tasks_at_once_are_run_by_two_idle_workers_whatever_their_lanes(site: Site) -> None:
    for _ in range(2):
        site.worker("echo")
    orders: list[tuple[Priority, Priority]] = [
        ("low", "high"),
        ("high", "low"),
        ("normal", "high"),
        ("low", "low"),
    ]
    for first, second in orders * 3:
        pair = [publish(site, first, 90), publish(site, second, 90)]

        def both_run(pair: Sequence[str] = pair) -> bool:
            states = [site.state(task_id) for task_id in pair]
            workers = {state.worker for state in states if state and state.state == "running"}
            return len(workers) == 2

        # By a race one worker may get both: what it cannot run it gives back.
        eventually(both_run)
        for task_id in pair:
            site.status.request_cancel("default", task_id)
        assert {(site.ended(each).status, site.ended(each).attempts) for each in pair} == {("cancelled", 1)}
    assert site.dead("echo") == []


def test_a_worker_of_one_lane_leaves_the_others_alone(site: Site) -> None:
    site.worker("echo", INFERQ_LANES="high")
    low, high = publish(site, "low", 0), publish(site, "high", 0)
    site.ended(high)
    assert site.results.load("default", low) is None
    assert site.depth("inference.echo.low") == 1
