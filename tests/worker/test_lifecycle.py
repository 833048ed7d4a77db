"""How workers and their engines start, are told to stop or to load anew, and are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from inferq.consumers.weights.manifest import describe
from tests.waiting import eventually
from tests.worker.conftest import Site, WorkerProcess, starts


def test_sigterm_finishes_the_task_in_hand_and_takes_no_other(site: Site, tmp_path: Path) -> None:
    worker = site.worker()
    task_id = site.publish({"fault": "progress"})
    eventually(lambda: (s := site.state(task_id)) and s.state == "running")
    other = site.publish({})
    assert worker.stop() == 0
    assert site.ended(task_id).status == "succeeded"
    assert site.results.load("default", other) is None
    assert site.depth("inference.faulty.normal") == 1


@pytest.mark.parametrize("fault", ["hang", "hang_hard"])
def test_a_task_that_outlasts_the_grace_period_is_given_back_unharmed(site: Site, fault: str) -> None:
    worker = site.worker(INFERQ_GRACE_SECONDS="0.5")
    task_id = site.publish({"fault": fault})
    eventually(lambda: (s := site.state(task_id)) and s.state == "running")
    assert worker.stop() == 0
    assert site.results.load("default", task_id) is None
    connection_depth = eventually(lambda: site.depth("inference.faulty.normal"))
    assert connection_depth == 1
    assert site.depth("inference.retry.5s") == 0


def test_two_sigints_stop_at_once(site: Site) -> None:
    worker = site.worker(INFERQ_GRACE_SECONDS="600")
    task_id = site.publish({"fault": "hang_hard"})
    eventually(lambda: (s := site.state(task_id)) and s.state == "running")
    worker.process.send_signal(signal.SIGINT)
    eventually(lambda: not worker.ready())
    worker.stop(signal.SIGINT)
    eventually(lambda: site.depth("inference.faulty.normal") == 1)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGABRT])
@pytest.mark.parametrize("fault", ["progress", "hang_hard"])
def test_a_killed_workers_task_runs_elsewhere_and_its_engine_is_gone(
    site: Site, tmp_path: Path, fault: str, end: signal.Signals
) -> None:
    first = site.worker()
    task_id = site.publish({"fault": fault, "options": {"times": 1, "marker": str(tmp_path / "m")}})
    eventually(lambda: starts(tmp_path / "m") == 1)
    engine = first.engine_pid()
    first.process.send_signal(end)
    first.process.wait()
    eventually(lambda: not psutil.pid_exists(engine) or psutil.Process(engine).status() == "zombie")
    site.worker()
    result = site.ended(task_id)
    assert result.status == "succeeded"


def test_a_killed_engine_is_replaced_while_idle(site: Site) -> None:
    worker = site.worker()
    old = worker.engine_pid()
    os.kill(old, signal.SIGKILL)
    task_id = site.publish({})
    assert site.ended(task_id).attempts == 1
    assert worker.engine_pid() != old


def test_an_engine_that_cannot_work_here_ends_the_worker_with_its_reason(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "load"
    switch.write_text("installation")
    worker = WorkerProcess(site, "faulty", {"FAULTY_LOAD": str(switch)})
    site.workers.append(worker)
    assert worker.process.wait(60) == 1
    assert "faulty is not installed right; install it" in worker.log.read_text()


@pytest.mark.parametrize("failure", ["error", "die", "slow"])
def test_an_engine_that_fails_to_load_is_tried_again(site: Site, tmp_path: Path, failure: str) -> None:
    switch = tmp_path / "load"
    switch.write_text(failure)
    # Long enough for the sound engine on a busy machine, which takes seconds as well.
    limit = {"INFERQ_START_LIMIT": "10"} if failure == "slow" else {}
    worker = WorkerProcess(site, "faulty", {"FAULTY_LOAD": str(switch), **limit})
    site.workers.append(worker)
    eventually(lambda: "next start in" in worker.log.read_text())
    assert not worker.ready()
    assert "the engine is loading" in worker.get("/readyz").text
    assert worker.get("/healthz").status_code == 200
    switch.unlink()
    worker.wait_ready()
    assert site.ended(site.publish({})).status == "succeeded"


def test_sighup_swaps_the_engine_between_tasks_and_keeps_the_old_one_if_the_new_fails(
    site: Site, tmp_path: Path
) -> None:
    switch = tmp_path / "load"
    worker = site.worker(FAULTY_LOAD=str(switch))
    switch.write_text("error")
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: "keeping the old one" in worker.log.read_text())
    assert site.ended(site.publish({})).engine.version == "1"  # type: ignore[union-attr]
    switch.write_text("2")
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: "now faulty 2" in worker.log.read_text())
    assert site.ended(site.publish({})).engine.version == "2"  # type: ignore[union-attr]


def connections_to(amqp_url: str, pid: int) -> int:
    """How many connections a process has to the broker."""
    found = psutil.Process(pid).net_connections("tcp")
    return sum(bool(one.raddr) and one.raddr.port == urlsplit(amqp_url).port for one in found)


def test_a_worker_is_ready_only_after_its_warm_up_runs(site: Site, tmp_path: Path) -> None:
    noted, gate = tmp_path / "noted", tmp_path / "gate"
    worker = WorkerProcess(
        site,
        "faulty",
        {"INFERQ_WARMUP": "3", "FAULTY_WARM_UPS": str(noted), "FAULTY_WARM_UP_GATE": str(gate)},
    )
    site.workers.append(worker)
    task = site.publish({})
    eventually(noted.exists)
    eventually(lambda: "the engine is loading" in worker.get("/readyz").text)
    assert site.state(task) is None
    assert noted.read_text().count("warm-up") == 1
    # The publisher's connection, and the consumer's: it opens while the engine loads.
    eventually(lambda: connections_to(site.broker.amqp_url, worker.process.pid) == 2)
    gate.touch()
    worker.wait_ready()
    assert site.ended(task).status == "succeeded"
    assert noted.read_text().count("warm-up") == 3


def test_sighup_moves_to_the_manifests_current_weights(site: Site, tmp_path: Path) -> None:
    manifest, cache = tmp_path / "weights.toml", tmp_path / "cache"

    def publish(version: str) -> None:
        folder = tmp_path / f"weights-{version}"
        folder.mkdir()
        (folder / "model.bin").write_bytes(version.encode() * 1000)
        manifest.write_text(describe("small", version, folder.as_uri(), folder))

    def model() -> str:
        engine = site.ended(site.publish({})).engine
        assert engine is not None
        assert engine.weights == (f"small {engine.model}",)
        return engine.model

    publish("a")
    worker = site.worker(
        FAULTY_WEIGHTS="small", INFERQ_WEIGHTS_MANIFEST=str(manifest), INFERQ_WEIGHTS_CACHE=str(cache)
    )
    assert model() == "a"
    publish("b")
    (tmp_path / "weights-b" / "model.bin").write_bytes(b"c" * 1000)
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: "keeping the old one" in worker.log.read_text())
    assert "model.bin has the SHA-256" in worker.log.read_text()
    assert model() == "a"
    (tmp_path / "weights-b" / "model.bin").write_bytes(b"b" * 1000)
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: "model b" in worker.log.read_text())
    assert model() == "b"
    assert (cache / "small" / "a").is_dir()  # the old engine still ran when the new one loaded
