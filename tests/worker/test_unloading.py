"""Workers whose engine is loaded only while there are tasks for it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from inferq.schemas import Task
from tests.waiting import eventually
from tests.worker.conftest import Site

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
