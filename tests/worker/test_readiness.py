"""What `/readyz` of a worker says: Kubernetes deletes pods that are not ready before all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from inferq.broker import BrokerSettings
from inferq.consumers.worker.engine_supervisor import EngineState
from inferq.consumers.worker.settings import WorkerSettings
from inferq.consumers.worker.worker import Worker
from inferq.schemas import get_type
from inferq.storage import StorageSettings


@dataclass
class FakeSlot:
    """A slot as a probe sees it."""

    loading: bool = False
    busy: bool = False
    disconnected: bool = False
    engine_state: EngineState = "loaded"
    name: str = "slot 0"

    @property
    def in_hand(self) -> list[object]:
        return ["a run"] if self.busy else []

    @property
    def waiting_for(self) -> str | None:
        return "the engine is loading" if self.loading else "RabbitMQ" if self.disconnected else None


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    settings = WorkerSettings(scratch_dir=tmp_path)
    worker = Worker(
        [get_type("echo")], settings, BrokerSettings(), StorageSettings(store_url=tmp_path.as_uri())
    )
    yield worker
    worker._status.close()
    worker._scratch.close()


def give(worker: Worker, *slots: Any) -> None:
    worker._slots[:] = slots


def metric(worker: Worker, name: str, **labels: str) -> float | None:
    return worker.metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize(
    ("slots", "ready"),
    [
        ([FakeSlot()], True),
        ([FakeSlot(loading=True)], False),
        ([FakeSlot(), FakeSlot(loading=True)], False),
        # An engine loads again while its slot, or another one, holds a result.
        ([FakeSlot(busy=True), FakeSlot(loading=True)], True),
        ([FakeSlot(loading=True, busy=True)], True),
        ([FakeSlot(disconnected=True)], True),
    ],
)
def test_a_worker_is_ready_with_its_engines_loaded_or_a_task_in_hand(
    worker: Worker, slots: list[FakeSlot], ready: bool
) -> None:
    give(worker, *slots)
    assert worker.readiness().ready is ready
    assert metric(worker, "inferq_worker_ready_slots") == sum(not slot.loading for slot in slots)


def test_a_worker_that_waits_for_a_service_is_ready_and_names_it(worker: Worker) -> None:
    give(worker, FakeSlot())
    worker._services[0]._pauses["object store"] = "it only reads"
    readiness = worker.readiness()
    assert (readiness.ready, readiness.waiting_for) == (True, ("object store: it only reads",))


def test_a_connection_that_is_lost_is_a_pause(worker: Worker) -> None:
    slot = FakeSlot()
    give(worker, slot)
    assert metric(worker, "inferq_worker_paused", service="RabbitMQ") == 0
    slot.disconnected = True
    assert metric(worker, "inferq_worker_paused", service="RabbitMQ") == 1


def test_a_worker_whose_idle_engine_is_unloaded_is_ready_and_says_so(worker: Worker) -> None:
    give(worker, FakeSlot(engine_state="unloaded"))
    readiness = worker.readiness()
    assert (readiness.ready, readiness.waiting_for) == (True, ())
    assert readiness.notes == ("slot 0: the engine is unloaded: idle",)
    assert metric(worker, "inferq_worker_loaded_engines") == 0
    give(worker, FakeSlot(loading=True, engine_state="unloaded"))
    assert worker.readiness().notes == ()
