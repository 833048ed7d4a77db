"""A worker kills and reaps what its engines leave behind, as the first process of a container has to."""

from __future__ import annotations

from pathlib import Path

from tests.waiting import eventually
from tests.worker.conftest import Site


def test_nothing_that_a_dead_engine_started_lives_on_or_stays_a_zombie(site: Site, tmp_path: Path) -> None:
    worker = site.worker(INFERQ_MAX_ATTEMPTS="1")
    daemon, helpers = tmp_path / "daemon", tmp_path / "helpers"
    options = {"daemon": str(daemon), "helpers": str(helpers)}
    (dead,) = worker.engine_pids()
    assert worker.get("/healthz").json() == {"healthy": True, "faults": [], "running": {}}
    assert site.ended(site.publish({"fault": "crash", "options": options})).status == "failed"
    left = [int(pid) for file in (daemon, helpers) for pid in file.read_text().split()]
    assert len(left) == 3
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), what="their end")
    (new,) = eventually(lambda: len(pids := worker.engine_pids()) == 1 and pids)
    assert new != dead
    task = site.publish({"fault": "gate", "options": {"gate": str(tmp_path / "gate")}})
    eventually(lambda: "slot 0" in worker.get("/healthz").json()["running"])
    (tmp_path / "gate").touch()
    assert site.ended(task).status == "succeeded"
    assert worker.stop() == 0
