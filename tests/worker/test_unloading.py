"""Workers whose engines are loaded only while there are tasks for them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from inferq.schemas import Task
from inferq.storage.workers import WorkerRegistry
from tests.waiting import eventually
from tests.worker.conftest import Site, starts

NORMAL = "inference.faulty.normal"


def test_an_engine_loads_for_a_task_and_ends_when_it_is_idle(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    worker = site.worker(INFERQ_LOAD="lazy", INFERQ_IDLE_UNLOAD="0.2", FAULTY_LOAD=str(switch))
    assert worker.engine_pids() == []
    assert worker.get("/readyz").json()["notes"] == ["slot 0: the engine is unloaded: idle"]
    for loads in (1, 2):
        result = site.ended(site.publish({}))
        assert (result.status, result.attempts) == ("succeeded", 1)
        eventually(lambda: worker.engine_pids() == [], "the end of the idle engine")
        metrics = worker.get("/metrics").text
        assert f'inferq_engine_unloads_total{{reason="idle"}} {loads}.0' in metrics
        assert "inferq_worker_ready_slots 1.0" in metrics
        assert "inferq_worker_loaded_engines 0.0" in metrics

    # It serves cancel and shutdown while it loads.
    switch.write_text("slow")
    cancelled = Task(task_id="cancelled", task_type="faulty", created_at=datetime.now(UTC))
    site.status.submit(cancelled)
    site.publish({"task_id": "cancelled"}, headers={"x-digest": cancelled.digest()})
    eventually(worker.engine_pids, "an engine that loads")
    site.status.request_cancel("default", "cancelled")
    assert site.ended("cancelled").status == "cancelled"
    site.publish({})
    eventually(lambda: "inferq_worker_busy_slots 1.0" in worker.get("/metrics").text, "a task in hand")
    assert worker.stop() == 0
    assert site.depth(NORMAL) == 1


def test_an_engine_that_can_never_load_ends_the_worker_and_no_task(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    switch.write_text("installation")
    worker = site.worker(INFERQ_LOAD="lazy", FAULTY_LOAD=str(switch))
    task = site.publish({})
    assert worker.process.wait(60) == 1
    assert "faulty is not installed right" in worker.log.read_text()
    assert site.results.load("default", task) is None
    assert site.depth(NORMAL) == 1


def test_a_worker_serves_two_types_with_one_engine_loaded_at_a_time(site: Site, tmp_path: Path) -> None:
    worker = site.worker("faulty,echo", INFERQ_MAX_LOADED="1")
    running = WorkerRegistry(site.status).read().workers
    assert {(info.task_type, info.slots) for info in running} == {("faulty", 1), ("echo", 1)}
    assert {info.name for info in running} == {running[0].name}
    assert worker.engine_pids() == []

    gate, marker = tmp_path / "gate", tmp_path / "marker"
    gated = {"fault": "gate", "options": {"gate": str(gate), "marker": str(marker)}}
    first = site.publish(gated)
    eventually(lambda: starts(marker) == 1, "a task that computes")
    others = [site.publish({"task_type": "echo", "payload": n}) for n in range(3)]
    eventually(lambda: "inferq_worker_busy_slots 2.0" in worker.get("/metrics").text, "a task that waits")
    (engine,) = worker.engine_pids()
    assert "inferq_worker_loaded_engines 1.0" in worker.get("/metrics").text
    gate.touch()
    last = site.publish({})
    for task in (first, *others, last):
        result = site.ended(task)
        assert (result.status, result.attempts) == ("succeeded", 1)
    assert engine not in worker.engine_pids()
    assert len(worker.engine_pids()) == 1
    metrics = worker.get("/metrics").text
    assert 'inferq_engine_unloads_total{reason="room"}' in metrics
    for task_type, count in (("faulty", 2), ("echo", 3)):
        settled = f'inferq_worker_tasks_total{{outcome="succeeded",task_type="{task_type}"}} {count}.0'
        eventually(lambda: settled in worker.get("/metrics").text, settled)  # noqa: B023
    assert worker.stop() == 0


def test_tasks_are_batched_once_the_engine_was_loaded(site: Site) -> None:
    site.worker("echo", INFERQ_LOAD="lazy")
    first = site.publish({"task_type": "echo", "delay": 1})
    others = [site.publish({"task_type": "echo", "payload": n}) for n in range(8)]
    assert site.ended(first).batch_size == 1
    assert max(site.ended(task).batch_size for task in others) > 1


def test_an_engine_that_can_never_load_ends_the_worker_of_several_types(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    switch.write_text("installation")
    worker = site.start_worker("echo,faulty", FAULTY_LOAD=str(switch))
    assert worker.process.wait(60) == 1
    assert "faulty is not installed right" in worker.log.read_text()
