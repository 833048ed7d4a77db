"""Services that go away under a worker: it waits, loses no inference, and burns no attempt."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from inferq.schemas import parse_task
from inferq.storage import ResultStore, StatusIndex, StorageSettings, open_store
from tests.conftest import Redis
from tests.proxy import TcpProxy
from tests.waiting import eventually
from tests.worker.conftest import Site, WorkerProcess, starts


def gauge(worker: WorkerProcess, name: str) -> float:
    lines = worker.get("/metrics").text.splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")))


def paused(worker: WorkerProcess, service: str) -> bool:
    return gauge(worker, f'inferq_worker_paused{{service="{service}"}}') == 1


def waits_for(worker: WorkerProcess, service: str) -> bool:
    """Whether it says so, and is ready all the same: of several pods, the one that is not ready is deleted first."""
    answer = worker.get("/readyz")
    waiting_for = answer.json()["waiting_for"]
    return answer.status_code == 200 and any(each.startswith(service) for each in waiting_for)


@dataclass
class Fragile:
    """A Redis of the test's own, and what a worker needs to find it."""

    node: Redis
    status: StatusIndex

    @property
    def settings(self) -> dict[str, str]:
        return {"INFERQ_REDIS_URL": self.node.url}


@pytest.fixture
def fragile(redis_node: Redis) -> Iterator[Fragile]:
    status = StatusIndex.from_settings(StorageSettings(redis_url=redis_node.url))
    yield Fragile(redis_node, status)
    status.close()


def state_of(fragile: Fragile, task_id: str) -> str | None:
    known = fragile.status.get("default", task_id)
    return known.state if known else None


# Redis.


def test_while_redis_is_away_a_task_waits_for_it_before_its_run(site: Site, fragile: Fragile) -> None:
    worker = site.worker("echo", **fragile.settings)
    fragile.node.kill()
    task_id = site.publish({"task_type": "echo", "payload": 1})
    eventually(lambda: waits_for(worker, "Redis"), what="a pause")
    assert paused(worker, "Redis")
    assert gauge(worker, "inferq_worker_without_redis") == 0
    assert site.results.load("default", task_id) is None
    fragile.node.start()
    result = site.ended(task_id)
    assert (result.status, result.attempts) == ("succeeded", 1)
    eventually(lambda: state_of(fragile, task_id) == "succeeded")
    eventually(worker.ready)
    assert not paused(worker, "Redis")
    said = worker.log.read_text()
    assert "for Redis, which is unavailable" in said
    assert "resumed: Redis is available" in said


def test_a_finished_run_waits_until_redis_knows_of_it(site: Site, fragile: Fragile, tmp_path: Path) -> None:
    worker = site.worker(**fragile.settings)
    task_id = site.publish({"fault": "gate", "options": {"gate": str(tmp_path / "g")}})
    eventually(lambda: state_of(fragile, task_id) == "running")
    fragile.node.kill()
    (tmp_path / "g").touch()
    assert site.ended(task_id).status == "succeeded"
    eventually(lambda: waits_for(worker, "Redis"))
    fragile.node.start()
    eventually(lambda: state_of(fragile, task_id) == "succeeded")
    assert site.depth("inference.faulty.normal") == 0


def test_patience_with_redis_is_paid_once_and_then_work_goes_on_without_it(
    site: Site, fragile: Fragile
) -> None:
    worker = site.worker("echo", **fragile.settings, INFERQ_REDIS_PATIENCE="2")
    fragile.node.kill()
    tasks = [site.publish({"task_type": "echo", "payload": n}) for n in range(20)]
    for task_id in tasks:
        assert site.ended(task_id).attempts == 1
    eventually(worker.ready)
    assert not paused(worker, "Redis")
    assert gauge(worker, "inferq_worker_without_redis") == 1
    assert worker.log.read_text().count("going on without Redis") == 1
    fragile.node.start()
    eventually(lambda: gauge(worker, "inferq_worker_without_redis") == 0, what="the return of Redis")
    task_id = site.publish({"task_type": "echo"})
    site.ended(task_id)
    eventually(lambda: state_of(fragile, task_id) == "succeeded")


def test_without_patience_a_worker_never_waits_for_redis(site: Site, tmp_path: Path) -> None:
    worker = site.worker(INFERQ_REDIS_URL="redis://127.0.0.1:1/0", INFERQ_REDIS_PATIENCE="0")
    options = {"times": 1, "marker": str(tmp_path / "m")}
    result = site.ended(site.publish({"fault": "transient", "options": options}))
    assert (result.status, result.attempts) == ("succeeded", 2)
    assert "for Redis, which is unavailable" not in worker.log.read_text()
    assert worker.ready()


def test_a_redis_that_hangs_is_waited_for_and_then_done_without(site: Site, fragile: Fragile) -> None:
    worker = site.worker("echo", **fragile.settings, INFERQ_REDIS_PATIENCE="3")
    os.kill(fragile.node.pid(), signal.SIGSTOP)
    try:
        task_id = site.publish({"task_type": "echo"})
        assert site.ended(task_id).attempts == 1
        assert "for Redis, which is unavailable" in worker.log.read_text()
    finally:
        os.kill(fragile.node.pid(), signal.SIGCONT)


def test_progress_never_waits_for_redis(site: Site, fragile: Fragile) -> None:
    site.worker(**fragile.settings)
    task_id = site.publish({"fault": "progress"})
    eventually(lambda: state_of(fragile, task_id) == "running")
    fragile.node.kill()
    result = site.ended(task_id)
    assert result.timings.inference is not None
    assert result.timings.inference < 15  # whatever waits for Redis does so for 20 s
    fragile.node.start()


def test_a_worker_that_is_stopped_while_it_waits_for_redis_gives_the_task_back(
    site: Site, fragile: Fragile
) -> None:
    worker = site.worker("echo", **fragile.settings, INFERQ_REDIS_PATIENCE="600")
    fragile.node.kill()
    task_id = site.publish({"task_type": "echo"})
    eventually(lambda: site.depth("inference.echo.normal") == 0 and paused(worker, "Redis"))
    assert worker.stop() == 0
    eventually(lambda: site.depth("inference.echo.normal") == 1)
    assert site.results.load("default", task_id) is None
    assert site.depth("inference.retry.5s") == 0
    fragile.node.start()
    site.worker("echo", **fragile.settings)
    assert site.ended(task_id).attempts == 1


def test_a_task_that_is_cancelled_while_its_worker_waits_for_redis_is_stopped(
    site: Site, fragile: Fragile
) -> None:
    worker = site.worker("echo", **fragile.settings)
    message = {"task_id": "t1", "task_type": "echo", "delay": 30}
    fragile.status.submit(parse_task(message))
    patient = StatusIndex.from_settings(StorageSettings(redis_url=fragile.node.url, redis_timeout=30))
    os.kill(fragile.node.pid(), signal.SIGSTOP)
    site.publish(message)
    eventually(lambda: paused(worker, "Redis"))
    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(patient.request_cancel, "default", "t1")
        os.kill(fragile.node.pid(), signal.SIGCONT)
        assert asked.result(20) is not None
    assert site.ended("t1").status == "cancelled"
    patient.close()


# The object store.


@dataclass
class RemoteStore:
    """S3 behind a line that can be cut."""

    line: TcpProxy
    settings: dict[str, str]
    results: ResultStore


@pytest.fixture
def remote(s3_url: str, aws: None, bucket: str) -> Iterator[RemoteStore]:
    line = TcpProxy(int(s3_url.rpartition(":")[2]))
    store = open_store(StorageSettings(store_url=f"s3://{bucket}", s3_endpoint_url=s3_url))
    settings = {
        "INFERQ_STORE_URL": f"s3://{bucket}",
        "INFERQ_S3_ENDPOINT_URL": f"http://127.0.0.1:{line.port}",
    }
    yield RemoteStore(line, settings, ResultStore(store))
    line.close()


def finish_in_an_outage(site: Site, remote: RemoteStore, worker: WorkerProcess, tmp_path: Path) -> str:
    """Have a run end while S3 is away: its worker waits with the result in hand. Gives the task's id."""
    marker, gate = tmp_path / "m", tmp_path / "g"
    task_id = site.publish({"fault": "gate", "options": {"marker": str(marker), "gate": str(gate)}})
    eventually(lambda: starts(marker) == 1)
    remote.line.refuse()
    gate.touch()
    eventually(lambda: waits_for(worker, "object store"), what="a pause")
    return task_id


def test_a_finished_inference_outlasts_an_outage_of_s3(
    site: Site, remote: RemoteStore, tmp_path: Path
) -> None:
    worker = site.worker(**remote.settings)
    task_id = finish_in_an_outage(site, remote, worker, tmp_path)
    assert paused(worker, "object store")
    remote.line.refuse(False)
    result = eventually(lambda: remote.results.load("default", task_id))
    assert (result.status, result.attempts) == ("succeeded", 1)
    assert starts(tmp_path / "m") == 1
    eventually(worker.ready)
    assert not paused(worker, "object store")
    assert site.depth("inference.retry.5s") == 0


def test_a_worker_that_is_stopped_in_an_outage_of_s3_gives_the_task_back_without_burning_an_attempt(
    site: Site, remote: RemoteStore, tmp_path: Path
) -> None:
    worker = site.worker(**remote.settings, INFERQ_GRACE_SECONDS="1")
    task_id = finish_in_an_outage(site, remote, worker, tmp_path)
    assert worker.stop(timeout=30) == 0
    eventually(lambda: site.depth("inference.faulty.normal") == 1)
    remote.line.refuse(False)
    site.worker(**remote.settings)
    result = eventually(lambda: remote.results.load("default", task_id))
    assert (result.status, result.attempts) == ("succeeded", 1)


def test_a_worker_that_has_taken_nothing_stops_at_once_though_s3_is_away(
    site: Site, remote: RemoteStore
) -> None:
    remote.line.refuse()
    worker = site.start_worker(**remote.settings, INFERQ_GRACE_SECONDS="600")
    eventually(
        lambda: "paused: waiting for object store, which is unavailable" in worker.log.read_text(),
        what="a pause",
    )
    assert worker.stop(timeout=30) == 0


def test_a_task_that_is_cancelled_while_its_worker_waits_for_s3_is_stopped(
    site: Site, remote: RemoteStore, tmp_path: Path
) -> None:
    worker = site.worker(**remote.settings)
    first = site.publish({})
    eventually(lambda: remote.results.load("default", first))  # it consumes: it has seen that S3 takes writes
    remote.line.refuse()
    task_id = site.publish({"fault": "gate", "options": {"gate": str(tmp_path / "g")}})
    eventually(lambda: waits_for(worker, "object store"), what="a pause")
    assert site.status.request_cancel("default", task_id) is not None
    remote.line.refuse(False)
    result = eventually(lambda: remote.results.load("default", task_id))
    assert result.status == "cancelled"
