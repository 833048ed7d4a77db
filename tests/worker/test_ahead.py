"""A slot that takes a second task while its engine computes the first."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pika
import pytest

from inferq.broker import connect
from inferq.consumers.runtime.process import EngineProcess
from inferq.consumers.worker.decision import MAX_DELIVERIES
from inferq.consumers.worker.engine_supervisor import EngineSupervisor, NotStarted
from inferq.consumers.worker.loaded_engines import LoadedEngines
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.settings import WorkerSettings
from inferq.schemas import parse_task
from tests.conftest import RabbitMQ
from tests.waiting import consistently, eventually
from tests.worker.conftest import Site, WorkerProcess, starts
from tests.worker.test_poison import hand_out

AHEAD = {"INFERQ_TAKE_AHEAD": "1"}
QUEUE = "inference.faulty.normal"


class Gate:
    """A task that stands at the engine until it is let go."""

    def __init__(self, site: Site, folder: Path, name: str = "gate", *, started: bool = True) -> None:
        self._gate = folder / name
        self._marker = folder / f"{name}-marker"
        self.task_id = site.publish(
            {"fault": "gate", "options": {"gate": str(self._gate), "marker": str(self._marker)}}
        )
        if started:
            self.wait_started()

    def wait_started(self) -> None:
        eventually(lambda: starts(self._marker) == 1, what="the start of a task")

    def open(self) -> None:
        self._gate.touch()


@pytest.fixture
def worker(site: Site) -> WorkerProcess:
    return site.worker(**AHEAD)


def taken_ahead(site: Site, message: dict[str, Any]) -> str:
    """Publish a task, and wait until it is in somebody's hands."""
    task_id = site.publish(message)
    eventually(lambda: site.depth(QUEUE) == 0, what="a second task in hand")
    return task_id


def test_the_second_task_waits_ready_for_the_engine_and_is_not_begun(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    site.store.put("files/default/second", b"the input")
    first = Gate(site, tmp_path)
    marker = tmp_path / "second"
    second = taken_ahead(site, {"file_url": "inferq:second", "options": {"marker": str(marker)}})
    scratch = tmp_path / "scratch"
    eventually(
        lambda: [f for f in scratch.rglob("*") if f.is_file() and f.read_bytes() == b"the input"],
        what="the second task's input",
    )
    assert starts(marker) == 0
    assert site.state(second) is None
    third = site.publish({})
    assert "inferq_worker_busy_slots 1.0" in worker.get("/metrics").text
    first.open()
    for task_id in (first.task_id, second, third):
        result = site.ended(task_id)
        assert (result.status, result.attempts) == ("succeeded", 1)
    assert site.ended(second).output == {"value": "the input"}
    assert site.ended(second).started_at >= site.ended(first.task_id).started_at  # type: ignore[operator]


def test_a_slot_takes_one_task_unless_it_is_told_otherwise(site: Site, tmp_path: Path) -> None:
    site.worker()
    first = Gate(site, tmp_path)
    site.publish({})
    consistently(lambda: site.depth(QUEUE) == 1, seconds=1.5)
    first.open()


def test_an_idle_worker_gets_the_task_before_a_busy_one_takes_it_ahead(site: Site, tmp_path: Path) -> None:
    for _ in range(2):
        site.worker(**AHEAD)
    first = Gate(site, tmp_path)
    for _ in range(6):
        assert site.ended(site.publish({})).status == "succeeded"
    assert site.results.load("default", first.task_id) is None
    first.open()
    site.ended(first.task_id)


def test_a_slot_whose_second_hand_computes_gives_way_too(
    site: Site, worker: WorkerProcess, tmp_path: Path, shared_rabbitmq: RabbitMQ
) -> None:
    first = Gate(site, tmp_path)
    second = Gate(site, tmp_path, "second", started=False)
    eventually(lambda: site.depth(QUEUE) == 0, what="a second task in hand")
    first.open()
    second.wait_started()
    site.ended(first.task_id)
    site.worker(**AHEAD)
    for _ in range(6):
        assert site.ended(site.publish({})).status == "succeeded"
    assert site.results.load("default", second.task_id) is None
    second.open()
    site.ended(second.task_id)
    # Idle again, only each slot's first thread asks for tasks.
    vhost = site.env["INFERQ_AMQP_URL"].rpartition("/")[2]

    def priorities() -> list[int]:
        consumers = shared_rabbitmq.management.get(f"/consumers/{vhost}").json()
        return sorted(c["arguments"].get("x-priority", 0) for c in consumers if c["queue"]["name"] == QUEUE)

    eventually(lambda: priorities() == [0, 0], what="the consumers of idle workers")


def test_no_task_is_kept_for_an_engine_that_is_still_loading(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "load"
    worker = site.worker(**AHEAD, FAULTY_LOAD=str(switch), INFERQ_START_LIMIT="60")
    first = Gate(site, tmp_path)
    second = taken_ahead(site, {})
    switch.write_text("slow")
    os.kill(worker.engine_pid(), signal.SIGKILL)
    first.open()
    site.worker()
    for task_id in (first.task_id, second):
        assert site.ended(task_id).status == "succeeded"
    eventually(lambda: worker.get("/readyz").status_code == 503, "no task in hand, and no engine")
    assert "inferq_worker_ready_slots 0.0" in worker.get("/metrics").text


@pytest.mark.parametrize("fault", [OSError("too many open files"), RuntimeError("a fault of our own")])
def test_a_new_engine_that_cannot_be_started_leaves_the_old_one_in_place(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    services = SimpleNamespace(
        settings=WorkerSettings(),
        task_type=SimpleNamespace(name="faulty"),
        metrics=WorkerMetrics(),
        loaded_engines=LoadedEngines(),
    )
    supervisor = EngineSupervisor("slot", cast(Any, services))
    supervisor.state = "loaded"

    def spawn(_process: EngineProcess) -> None:
        raise fault

    monkeypatch.setattr(EngineProcess, "spawn", spawn)
    old = supervisor.engine
    supervisor.reload_requested.set()
    if isinstance(fault, OSError):
        supervisor.look()
    else:
        with pytest.raises(RuntimeError):
            supervisor.look()
    with supervisor.lease() as lease, pytest.raises(NotStarted):
        lease.acquire()  # not held by the attempt that failed; only its engine was never loaded
    assert supervisor.engine is old


def test_one_that_is_cancelled_while_it_waits_never_starts(site: Site) -> None:
    site.worker("echo", **AHEAD)
    first = site.publish({"task_type": "echo", "delay": 60})
    eventually(lambda: site.state(first), what="the start of the first task")
    second = {"task_id": "second", "task_type": "echo"}
    site.status.submit(parse_task(second))
    site.publish(second)
    eventually(lambda: site.depth("inference.echo.normal") == 0, what="a second task in hand")
    site.status.request_cancel("default", "second")
    assert site.ended("second").status == "cancelled"
    assert site.results.load("default", first) is None
    site.status.request_cancel("default", first)
    site.ended(first)


def test_sigterm_gives_back_what_waits_and_finishes_what_runs(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    first = Gate(site, tmp_path)
    second = taken_ahead(site, {})
    worker.process.send_signal(signal.SIGTERM)
    eventually(lambda: site.depth(QUEUE) == 1, what="the second task given back")
    first.open()
    assert worker.process.wait(20) == 0
    assert site.ended(first.task_id).status == "succeeded"
    assert site.results.load("default", second) is None
    assert site.state(second) is None


def test_an_engine_that_dies_costs_the_waiting_task_no_attempt(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    first = Gate(site, tmp_path)
    second = taken_ahead(site, {})
    os.kill(worker.engine_pid(), signal.SIGKILL)
    result = site.ended(second)
    assert (result.status, result.attempts) == ("succeeded", 1)
    first.open()
    assert site.ended(first.task_id).attempts == 2


def test_a_killed_worker_is_no_lost_run_of_the_task_that_waited(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    """Beside a task that takes its worker down, a harmless one must not be taken for another such."""
    first = Gate(site, tmp_path)
    second = taken_ahead(site, {})
    worker.process.kill()
    worker.process.wait()
    assert site.state(second) is None
    assert site.state(first.task_id) is not None
    first.open()
    site.worker(**AHEAD)
    for task_id in (first.task_id, second):
        assert site.ended(task_id).status == "succeeded"


def test_one_that_has_ended_already_does_not_wait(site: Site, worker: WorkerProcess, tmp_path: Path) -> None:
    task = {"task_id": "twice"}
    site.publish(task)
    site.ended("twice")
    first = Gate(site, tmp_path)
    site.publish(task)
    last = taken_ahead(site, {})  # behind it
    eventually(lambda: 'outcome="skipped"' in worker.get("/metrics").text, what="the copy passed over")
    first.open()
    site.ended(last)


def test_one_whose_input_is_missing_fails_without_waiting_for_the_engine(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    first = Gate(site, tmp_path)
    failed = site.ended(site.publish({"file_url": "inferq:absent"}))
    assert (failed.status, failed.error and failed.error.code) == ("failed", "input_not_found")
    assert site.results.load("default", first.task_id) is None
    first.open()
    site.ended(first.task_id)


def test_one_that_was_handed_out_often_and_never_lost_has_its_input(site: Site, tmp_path: Path) -> None:
    """Until Redis says that no run was lost it looks like poison, for which nothing is fetched."""
    site.store.put("files/default/often", b"the input")
    options = {"gate": str(tmp_path / "gate"), "marker": str(tmp_path / "marker")}
    task_id = site.publish({"fault": "gate", "file_url": "inferq:often", "options": options})
    worker = site.worker(INFERQ_GRACE_SECONDS="0")
    eventually(lambda: starts(tmp_path / "marker") == 1, what="the start of a task")
    worker.stop()
    hand_out(site, MAX_DELIVERIES)
    (tmp_path / "gate").touch()
    site.worker(**AHEAD)
    assert site.ended(task_id).output == {"value": "the input"}


def test_engines_are_swapped_although_one_task_follows_the_other(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    old = worker.engine_pid()
    gates = [Gate(site, tmp_path)]
    worker.process.send_signal(signal.SIGHUP)
    while old in worker.engine_pids():
        assert len(gates) < 100, "the engine was not swapped"
        gates.append(Gate(site, tmp_path, f"gate-{len(gates)}", started=False))
        eventually(lambda: site.depth(QUEUE) == 0, what="the next task in hand")
        gates[-2].open()
        gates[-1].wait_started()
    gates[-1].open()
    for gate in gates:
        assert site.ended(gate.task_id).attempts == 1


def test_a_stream_of_tasks_runs_each_once_and_one_at_a_time(
    site: Site, worker: WorkerProcess, tmp_path: Path
) -> None:
    marker = tmp_path / "starts"
    ids = [site.publish({"options": {"marker": str(marker)}}) for _ in range(40)]
    spans = sorted((r.started_at, r.finished_at) for r in map(site.ended, ids) if r.started_at)
    assert starts(marker) == len(spans) == 40
    connection = connect(site.broker, name="test")
    queue: pika.frame.Method[Any] = connection.channel().queue_declare(QUEUE, passive=True)
    assert queue.method.message_count == 0
    connection.close()
