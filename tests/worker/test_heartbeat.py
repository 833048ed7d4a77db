"""What a worker reports of itself."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from inferq.consumers.runtime.gpus import Gpus
from inferq.consumers.worker import heartbeat as heartbeats
from inferq.consumers.worker.heartbeat import Heartbeat
from inferq.consumers.worker.track_figures import TrackFigures
from inferq.consumers.worker.worker import priority_by_age
from inferq.schemas import EngineInfo
from inferq.schemas.monitor import GpuMemory, WorkerInfo
from inferq.storage import StatusIndex, StorageSettings
from inferq.storage.tracks import TrackRecords, bucket_of
from inferq.storage.workers import WorkerRegistry
from tests.probes.registries import install_a_gpu
from tests.waiting import eventually
from tests.worker.conftest import Site

ENGINE = EngineInfo(name="e", version="1", model="m", device="cpu")


class FakeSlot:
    """A slot with tasks in hand."""

    def __init__(self) -> None:
        self.loading = self.disconnected = self.busy = False
        self.consumers = 1
        self.engine: EngineInfo | None = ENGINE
        self.in_hand: list[Any] = []
        self.taken: Counter[str] = Counter()
        self.requeued: Counter[str] = Counter()


class FakeServices:
    def __init__(self, status: StatusIndex, track: str = "") -> None:
        self.status = status
        self.settings = SimpleNamespace(worker_name="w", lanes=("high", "normal"), track=track)
        self.track_figures = TrackFigures()
        self.task_type = SimpleNamespace(name="echo")
        self.waits: list[str] = []
        self.consumer_priority = -7
        self.hand_changed = threading.Event()

    def pauses(self) -> list[str]:
        return self.waits


@pytest.fixture
def services(redis_url: str) -> Iterator[FakeServices]:
    index = StatusIndex.from_settings(StorageSettings(redis_url=redis_url.removesuffix("/0") + "/6"))
    index.write(lambda client: client.flushdb())
    yield FakeServices(index)
    index.close()


def heartbeat(services: FakeServices, *slots: FakeSlot) -> Heartbeat:
    made: Any = Heartbeat
    beat: Heartbeat = made(services, slots, Gpus())
    return beat


def test_the_state_says_what_a_worker_does(services: FakeServices) -> None:
    slot = FakeSlot()
    beat = heartbeat(services, slot)
    slot.loading = True
    assert beat.info().state == "loading"
    slot.loading = False
    assert beat.info().state == "idle"
    slot.busy = True
    task = SimpleNamespace(tenant="t", task_id="a")
    slot.in_hand = [
        SimpleNamespace(lane="high", task=task, arrived_at=datetime.now(UTC)),
        SimpleNamespace(lane="normal", task=None, arrived_at=datetime.now(UTC)),
    ]
    info = beat.info()
    assert (info.state, info.busy, info.in_hand) == ("busy", 1, {"high": 1, "normal": 1})
    assert [(task.tenant, task.task_id, task.priority) for task in info.tasks] == [("t", "a", "high")]
    services.waits = ["object store: at 10.0.0.1", "Redis: at 10.0.0.2:6379"]
    slot.disconnected = True
    info = beat.info()
    assert (info.state, info.paused_for) == ("paused", ("object store", "Redis", "RabbitMQ"))
    assert (info.engine, info.lanes, info.slots) == (ENGINE, ("high", "normal"), 1)
    assert info.consumer_priority == -7


def test_two_workers_of_one_process_id_have_their_own_ids(services: FakeServices) -> None:
    assert heartbeat(services).worker_id != heartbeat(services).worker_id


def test_deliveries_are_counted_once_however_often_redis_fails(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = FakeSlot()
    beat = heartbeat(services, slot)
    registry = WorkerRegistry(services.status)
    slot.taken["normal"] = 3
    assert beat._beat(beat.info())
    slot.taken["normal"] = 5
    with monkeypatch.context() as patched:
        patched.setattr(beat._registry, "_beat", lambda *_: False)
        assert not beat._beat(beat.info())
    assert registry.read().taken_of("echo", "normal") == 3
    slot.taken["normal"] = 6
    assert beat._beat(beat.info())
    assert registry.read().taken_of("echo", "normal") == 6
    slot.taken["high"] = 1
    slot.requeued["normal"] = 2
    beat.stop()
    found = registry.read()
    assert (found.requeued_of("echo", "normal"), found.requeued_of("echo", "high")) == (2, 0)
    assert (found.taken_of("echo", "high"), found.taken_of("echo", "normal"), found.workers) == (1, 6, ())


def test_a_worker_reports_at_once_that_it_is_busy_or_idle(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "_LOOK_SECONDS", 600.0)
    registry = WorkerRegistry(services.status)
    slot = FakeSlot()
    beat = heartbeat(services, slot)
    beat.start()
    eventually(lambda: [worker.state for worker in registry.read().workers] == ["idle"])
    slot.busy = True
    services.hand_changed.set()
    eventually(lambda: [worker.state for worker in registry.read().workers] == ["busy"])
    slot.busy = False
    services.hand_changed.set()
    eventually(lambda: [worker.state for worker in registry.read().workers] == ["idle"])
    beat.stop()
    assert not beat.is_alive()


def test_between_two_tasks_of_a_backlog_a_worker_is_not_idle(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slot(FakeSlot):
        """Busy at each look but the second."""

        looks = iter([True, False])

        @property
        def busy(self) -> bool:
            return next(self.looks, True)

        @busy.setter
        def busy(self, _busy: bool) -> None: ...

    monkeypatch.setattr(heartbeats, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeats, "_REST_SECONDS", 0.0)
    beat = heartbeat(services, Slot())
    said: list[int] = []

    def note(info: WorkerInfo) -> bool:
        said.append(info.busy)
        return True

    monkeypatch.setattr(beat, "_beat", note)
    monkeypatch.setattr(heartbeats, "HEARTBEAT_SECONDS", 0.0)
    beat.start()
    eventually(lambda: len(said) >= 3)
    beat.stop()
    assert set(said) == {1}


def test_a_worker_that_starts_later_gets_its_tasks_later() -> None:
    start = datetime(2026, 11, 30, tzinfo=UTC)
    order = [priority_by_age(start + timedelta(seconds=seconds)) for seconds in (0, 0.1, 1, 86_400, 9e6)]
    assert order == sorted(set(order), reverse=True)
    assert all(-(2**30) <= priority <= 0 for priority in order)


def test_a_tracks_attempts_are_counted_once_however_often_redis_fails(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = FakeServices(services.status, "canary")
    beat, records = heartbeat(tracked), TrackRecords(services.status)
    figures = tracked.track_figures
    figures.count("succeeded", 2.0, cached=False)
    figures.count("retried", None, cached=False)
    for outcome in ("cancelled", "skipped", "given_back", "deferred", "duplicate"):
        figures.count(outcome, 1.0, cached=False)
    figures.count("succeeded", 0.0, cached=True)  # no engine computed it
    assert beat._beat(beat.info())
    figures.count("failed", 0.1, cached=False)
    with monkeypatch.context() as patched:
        patched.setattr(beat._track_records, "_add", lambda *_: False)
        assert beat._beat(beat.info())
    assert records.read("echo", 60)["canary"].outcomes == {"succeeded": 1, "retried": 1}
    beat.stop()
    found = records.read("echo", 60)
    assert found.keys() == {"canary"}
    assert found["canary"].outcomes == {"succeeded": 1, "retried": 1, "failed": 1}
    assert found["canary"].buckets == {bucket_of(2.0): 1}
    assert beat.info().track == "canary"


def test_a_worker_without_a_track_counts_none(services: FakeServices) -> None:
    services.track_figures.count("succeeded", 2.0, cached=False)
    beat = heartbeat(services)
    assert beat._beat(beat.info())
    beat.stop()
    assert TrackRecords(services.status).read("echo", 60) == {}
    assert beat.info().track is None


def test_the_memory_of_gpus_is_asked_of_them_alone(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert heartbeat(services).info().gpus is None
    install_a_gpu(monkeypatch)
    assert heartbeat(services).info().gpus == (GpuMemory(gpu="0", used_bytes=1, total_bytes=3),)


def test_a_worker_is_registered_while_it_lives_with_the_task_that_it_runs(site: Site) -> None:
    registry = WorkerRegistry(site.status)
    worker = site.start_worker("echo", INFERQ_WORKER_NAME="here", INFERQ_GRACE_SECONDS="0")

    def seen(state: str) -> WorkerInfo | None:
        return next((w for w in registry.read().workers if w.state == state), None)

    idle = eventually(lambda: seen("idle"))
    assert (idle.name, idle.pid, idle.task_type, idle.tasks) == ("here", worker.process.pid, "echo", ())
    assert idle.engine is not None
    assert idle.engine.name == "echo"
    task_id = site.publish({"task_type": "echo", "delay": 30})
    busy = eventually(lambda: seen("busy"))
    assert [task.task_id for task in busy.tasks] == [task_id]
    assert busy.in_hand == {"normal": 1}
    assert registry.read().taken_of("echo", "normal") == 1
    worker.stop()
    assert registry.read().workers == ()
    assert registry.read().requeued_of("echo", "normal") == 1, "the task was given back"
