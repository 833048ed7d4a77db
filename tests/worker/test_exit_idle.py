"""A worker that exits once it has been idle for INFERQ_EXIT_IDLE seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from inferq.consumers.worker import slot as slot_module
from inferq.consumers.worker import worker as worker_module
from inferq.consumers.worker.slot import Slot
from inferq.consumers.worker.worker import Worker
from inferq.schemas import get_type
from inferq.storage import StorageSettings
from tests.waiting import eventually
from tests.worker.conftest import Site

NORMAL = "inference.echo.normal"


@pytest.fixture
def start(site: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Worker, threading.Thread]]:
    """Starts a worker in this process, whose children belong to other tests."""
    monkeypatch.setattr(worker_module, "adopt_orphans", lambda: None)
    monkeypatch.setattr(worker_module, "end_orphans", lambda: None)
    storage = StorageSettings(redis_url=site.env["INFERQ_REDIS_URL"], store_url=site.env["INFERQ_STORE_URL"])

    def begin(**settings: Any) -> tuple[Worker, threading.Thread]:
        chosen = worker_module.WorkerSettings(scratch_dir=site.folder, warmup=0, **settings)
        worker = Worker([get_type("echo")], chosen, site.broker, storage)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        return worker, thread

    return begin


def test_it_exits_after_its_last_task_and_leaves_none_that_waits(site: Site) -> None:
    tasks = [site.publish({"task_type": "echo", "delay": delay}) for delay in (1.5, 1.5, 0)]
    worker = site.start_worker("echo", INFERQ_EXIT_IDLE="1", INFERQ_WARMUP="0")
    assert worker.process.wait(60) == 0
    assert [site.results.load("default", task) is not None for task in tasks] == [True] * 3
    assert "no task for 1 s (INFERQ_EXIT_IDLE)" in worker.log.read_text()


@pytest.mark.parametrize("arrives", ["before it stops", "after it stops"])
def test_a_task_that_arrives_at_that_moment_is_neither_lost_nor_charged_an_attempt(
    site: Site, start: Callable[..., tuple[Worker, threading.Thread]], arrives: str
) -> None:
    worker, thread = start(exit_idle=0.2, grace_seconds=0)
    stop, tasks = worker._services[0].stop, list[str]()

    def stop_as_a_task_arrives(grace: float) -> None:
        if arrives == "after it stops" or tasks:
            stop(grace)
        if not tasks:
            tasks.append(site.publish({"task_type": "echo", "delay": 0.5}))
            if arrives == "before it stops":
                eventually(lambda: (s := site.state(tasks[0])) and s.state == "running")
                stop(grace)

    worker._services[0].stop = stop_as_a_task_arrives  # type: ignore[method-assign]
    eventually(lambda: not thread.is_alive(), "the end of the worker")
    if arrives == "after it stops":
        eventually(lambda: site.depth(NORMAL) == 1, "the task is in its queue again")
        _, second = start(exit_idle=0.2)
        eventually(lambda: not second.is_alive(), "the end of the second worker")
    result = site.results.load("default", tasks[0])
    assert result is not None
    assert (result.status, result.attempts) == ("succeeded", 1)
    assert site.depth(NORMAL) == 0


def test_a_slot_is_idle_only_while_it_could_take_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_module, "time", SimpleNamespace(monotonic=lambda: 100.0))

    def idle(*, subscribed: float | None, busy: bool = False, ended: tuple[float, ...] = (0.0,)) -> float:
        slot = Slot.__new__(Slot)
        threads: Any = [SimpleNamespace(ended_at=at) for at in ended]
        slot._threads, slot._supervisor = threads, SimpleNamespace(busy=busy)  # type: ignore[assignment]
        slot._consumer = SimpleNamespace(idle_seconds=subscribed)  # type: ignore[assignment]
        return slot.idle_seconds

    assert idle(subscribed=7) == 7
    assert idle(subscribed=None) == 0, "it waits for a service, and tasks may wait for it"
    assert idle(subscribed=7, busy=True) == 0, "a task taken ahead is in hand"
    assert idle(subscribed=7, ended=(50.0, 98.0)) == 2, "a task taken ahead has just ended"
