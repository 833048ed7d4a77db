"""Tasks that take down their engine, or the whole worker: each ends in a recorded failure."""

from __future__ import annotations

from pathlib import Path

import redis

from inferq.broker import connect
from inferq.consumers.worker.decision import MAX_DELIVERIES, MAX_ENGINE_DEATHS, MAX_ORPHANED_RUNS
from tests.waiting import eventually
from tests.worker.conftest import Site, WorkerProcess, starts


def kill_workers(site: Site, marker: Path, times: int) -> None:
    """Start one worker after the other until the task has taken down `times` of them."""
    for number in range(times):
        worker = WorkerProcess(site, "faulty", {})
        site.workers.append(worker)
        assert worker.process.wait(30) == -9
        assert starts(marker) == number + 1


def forget(site: Site) -> None:
    """What Redis does that lost its disk."""
    with redis.Redis.from_url(site.env["INFERQ_REDIS_URL"]) as connection:
        connection.flushdb()


def hand_out(site: Site, times: int) -> None:
    """Have the broker hand the task out, and take it back from a consumer that does nothing with it."""
    connection = connect(site.broker, name="test")
    channel = connection.channel()
    for _ in range(times):
        method, _, _ = eventually(
            lambda: (got := channel.basic_get("inference.faulty.normal"))[0] is not None and got
        )
        channel.basic_reject(method.delivery_tag, requeue=True)
    connection.close()


def test_a_task_that_takes_down_every_worker_ends_as_poison(site: Site, tmp_path: Path) -> None:
    marker = tmp_path / "m"
    task_id = site.publish({"fault": "kill_worker", "options": {"marker": str(marker)}})
    kill_workers(site, marker, MAX_ORPHANED_RUNS)
    site.worker()
    result = site.ended(task_id)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.code == "poison"
    assert f"started {MAX_ORPHANED_RUNS} times" in result.error.message
    (letter,) = eventually(site.dead)
    assert (letter.reason, letter.task_id) == ("poison", task_id)
    eventually(lambda: (s := site.state(task_id)) and s.state == "failed")
    assert starts(marker) == MAX_ORPHANED_RUNS
    assert site.ended(site.publish({})).status == "succeeded"


def test_where_redis_has_forgotten_the_brokers_count_catches_it(site: Site, tmp_path: Path) -> None:
    marker = tmp_path / "m"
    task_id = site.publish({"fault": "kill_worker", "options": {"marker": str(marker)}})
    hand_out(site, MAX_DELIVERIES - 2)
    for _ in range(2):
        forget(site)
        assert site.results.load("default", task_id) is None
        marker.unlink(missing_ok=True)
        kill_workers(site, marker, 1)
    forget(site)
    site.worker()
    result = site.ended(task_id)
    assert result.error is not None
    assert result.error.code == "poison"
    assert f"delivered {MAX_DELIVERIES} times" in result.error.message
    (letter,) = eventually(site.dead)
    assert (letter.reason, letter.task_id) == ("poison", task_id)


def test_a_task_that_lost_its_workers_by_chance_still_succeeds(site: Site, tmp_path: Path) -> None:
    marker = tmp_path / "m"
    options = {"marker": str(marker), "times": MAX_ORPHANED_RUNS - 1}
    task_id = site.publish({"fault": "kill_worker", "options": options})
    kill_workers(site, marker, MAX_ORPHANED_RUNS - 1)
    site.worker()
    result = site.ended(task_id)
    assert (result.status, result.attempts) == ("succeeded", 1)


def test_being_given_back_is_no_lost_run(site: Site, tmp_path: Path) -> None:
    marker = tmp_path / "m"
    task_id = site.publish({"fault": "gate", "options": {"marker": str(marker), "gate": str(tmp_path / "g")}})
    for number in range(MAX_ORPHANED_RUNS + 1):
        worker = site.worker(INFERQ_GRACE_SECONDS="0")
        eventually(lambda: starts(marker) == number + 1, what="another start")  # noqa: B023
        assert worker.stop() == 0
    (tmp_path / "g").touch()
    site.worker()
    assert site.ended(task_id).status == "succeeded"
    assert site.dead() == []


def test_a_task_that_takes_down_three_engines_is_poison(site: Site, tmp_path: Path) -> None:
    worker = site.worker()
    marker = tmp_path / "m"
    task_id = site.publish({"fault": "crash", "options": {"marker": str(marker)}})
    result = site.ended(task_id)
    assert result.error is not None
    assert result.error.code == "poison"
    assert result.attempts == MAX_ENGINE_DEATHS
    assert starts(marker) == MAX_ENGINE_DEATHS
    assert f"inferq_engine_deaths_total {MAX_ENGINE_DEATHS}.0" in worker.get("/metrics").text
    (letter,) = eventually(site.dead)
    assert letter.reason == "poison"


def test_a_producers_own_delivery_count_is_not_believed(site: Site) -> None:
    task_id = site.publish({}, headers={"x-delivery-count": 10 * MAX_DELIVERIES})
    site.worker()
    assert site.ended(task_id).status == "succeeded"
    assert site.dead() == []
