"""What becomes of a delivery where even the failing of it fails."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from inferq.broker import Delivery, Message
from inferq.consumers.runtime.messages import Done
from inferq.consumers.worker.inputs import fetch_inputs
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.scratch import ScratchFolder, ScratchUnusable
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.settings import WorkerSettings
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import InvalidTask, Result, Task, get_type, parse_task
from inferq.storage import (
    BatchIndex,
    Fetcher,
    LocalStore,
    ResultStore,
    StatusIndex,
    StorageSettings,
    StoreOutage,
)
from tests.conftest import Redis
from tests.runs import begin_run

TASK = {"task_id": "b.7", "task_type": "echo", "payload": 1, "batch_id": "b", "batch_line": 7}


class ForgetfulPublisher:
    """Cannot make a retry's message; all else is kept."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def publish(self, message: Message) -> Future[None]:
        if message.exchange.startswith("inference.retry"):
            raise RuntimeError("a fault of our own")
        self.sent.append(message)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def broken(*_arguments: object) -> None:
    raise RuntimeError("another fault of our own")


class FakeLease:
    """The lease of an engine that is always free."""

    usable, info, held = True, None, False
    computing = nullcontext

    def __init__(self, shared: bool, engine: object) -> None:
        self.shared = shared
        self.engine = engine

    def acquire(self, *_: object, **__: object) -> bool:
        self.held = True
        return True

    def step_aside(self) -> None:
        return

    finish = step_aside

    def release(self) -> None:
        self.held = False


@pytest.fixture
def services(redis_url: str, tmp_path: Path) -> Iterator[WorkerServices]:
    store = LocalStore(tmp_path / "store", fsync=False)
    storage = StorageSettings(redis_url=redis_url, store_url=(tmp_path / "store").as_uri())
    services = WorkerServices(
        settings=WorkerSettings(), task_type=get_type("echo"), store=store, results=ResultStore(store),
        fetcher=Fetcher(store, storage), status=StatusIndex.from_settings(storage),
        publisher=cast(Any, ForgetfulPublisher()), metrics=WorkerMetrics(),
        scratch=ScratchFolder(tmp_path / "scratch"),
    )  # fmt: skip
    yield services
    services.status.close()
    services.scratch.close()


def settled(
    services: WorkerServices,
    delivery: Delivery,
    prepare: Callable[..., None] = broken,
    *,
    shared: bool = False,
    held: bool = True,
    run: Callable[..., Any] = broken,
) -> list[str]:
    """Complete a delivery by an engine that breaks; gives what was done with it."""
    done: list[str] = []
    consumer = SimpleNamespace(
        ack=lambda _delivery, *, more, low_priority: done.append(
            "ack, low priority" if low_priority else "ack"
        ),
        requeue=lambda _delivery: done.append("requeue"),
        holds=lambda _delivery: held,
        look_early=lambda: None,
    )
    lease = FakeLease(shared, SimpleNamespace(usable=True, info=None, prepare=prepare, run=run))
    TaskRun(services, cast(Any, consumer), cast(Any, lease), delivery, "normal").complete()
    assert not lease.held  # or the next task would wait for ever
    return done


DELIVERY = Delivery(
    queue="inference.echo.normal", tag=1, epoch=1, body=json.dumps(TASK).encode(),
    routing_key="task_type.echo.normal", headers={}, redelivered=False,
)  # fmt: skip


def test_it_leaves_a_dead_letter_and_a_record_so_that_its_batch_ends(
    services: WorkerServices, caplog: pytest.LogCaptureFixture
) -> None:
    assert settled(services, DELIVERY) == ["ack"]
    (letter,) = cast(ForgetfulPublisher, services.publisher).sent
    assert letter.exchange == "inference.dead"
    result = services.results.load("default", "b.7")
    assert result is not None
    assert (result.status, result.batch_id, result.batch_line) == ("failed", "b", 7)
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("worker_error", True)
    incident = re.search(r"RuntimeError \(incident ([0-9a-f]{8})\)", result.error.message)
    assert incident is not None
    assert "of our own" not in result.error.message + str(letter.headers)
    assert f"incident {incident[1]}" in caplog.text
    assert "a fault of our own" in caplog.text
    status = services.status.get("default", "b.7")
    assert status is None or status.state == "failed"


def test_a_slot_with_another_task_in_hand_gives_way_from_the_ack_on(services: WorkerServices) -> None:
    assert settled(services, replace(DELIVERY, tag=3), shared=True) == ["ack, low priority"]


def test_what_was_lost_before_its_run_begins_is_another_workers(services: WorkerServices) -> None:
    ran: list[str] = []
    assert settled(services, DELIVERY, ran.append, held=False) == ["requeue"]
    assert services.results.load("default", "b.7") is None
    assert cast(ForgetfulPublisher, services.publisher).sent == []


def test_what_cannot_even_be_dead_lettered_is_not_acknowledged(
    services: WorkerServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.publisher, "publish", broken)
    assert settled(services, DELIVERY) == ["requeue"]


def test_a_pause_is_over_however_the_call_ends(services: WorkerServices) -> None:
    for end in (InvalidTask("no such upload"), None):
        calls: list[Exception | None] = [StoreOutage("away"), end]

        def call(calls: list[Exception | None] = calls) -> None:
            if (error := calls.pop(0)) is not None:
                raise error

        with suppress(InvalidTask):
            services.retry_until_available("object store", call)
        assert services.pauses() == []
        assert services.metrics.paused.labels("object store")._value.get() == 0


def test_an_idle_worker_unsubscribes_while_the_store_takes_no_writes(
    services: WorkerServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Exception | None] = [None, StoreOutage("read-only"), StoreOutage("read-only"), None]
    seen: list[str] = []

    def ping() -> None:
        seen.extend(services.pauses())
        if (error := answers.pop(0)) is not None:
            raise error

    monkeypatch.setattr(services.store, "ping", ping)
    services.wait_for_store()
    services.look_at_store(lambda: seen.append("unsubscribed"))
    assert len(answers) == 3, "it has just been looked at"
    monkeypatch.setattr(services, "_next_store_look", 0.0)
    services.look_at_store(lambda: seen.append("unsubscribed"))
    assert seen == ["unsubscribed", "object store: read-only"]
    assert (answers, services.pauses()) == ([], [])


@pytest.mark.parametrize("inputs", [{}, {"file_url": "data:,x"}], ids=["no inputs", "an input"])
def test_a_full_disk_burns_no_attempt(
    services: WorkerServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, str]
) -> None:
    disk = os.statvfs(tmp_path)
    full = SimpleNamespace(f_bavail=10, f_frsize=4096, f_files=disk.f_files, f_favail=disk.f_favail)
    seen: list[list[str]] = []

    def statvfs(_path: Path) -> Any:
        seen.append(services.pauses())
        return full if len(seen) < 3 else disk

    services.scratch.close()
    services.scratch = ScratchFolder(tmp_path / "small", statvfs=statvfs)
    monkeypatch.setattr(Task, "inputs", lambda _: inputs)
    task = parse_task(TASK)
    fetched = fetch_inputs(services, task, Path(services.scratch.path) / "run", lambda: None)
    assert set(fetched.files) == set(inputs)
    assert "is full" in seen[-1][0]
    assert services.pauses() == []


def test_a_scratch_folder_that_was_deleted_is_made_again_and_burns_no_attempt(
    services: WorkerServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "inputs", lambda _: {"file_url": "data:,x"})
    task, folder = parse_task(TASK), services.scratch.path
    for gone in (folder / ".lock", folder, folder.parent):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        fetched = fetch_inputs(services, task, folder / "run", lambda: None)
        assert fetched.files["file_url"].bytes == 1
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        ScratchFolder(tmp_path / "scratch").close()  # another worker's sweep
        assert folder.exists(), "it is held again"


def test_a_folder_that_others_could_read_is_not_taken_for_a_deleted_one(services: WorkerServices) -> None:
    shutil.rmtree(services.scratch.path)
    services.scratch.path.mkdir(mode=0o755)
    with pytest.raises(ScratchUnusable, match="private"):
        services.scratch.check()
    services.scratch.path.rmdir()
    services.scratch.check()


def test_tmpfiles_is_told_to_spare_the_scratch_folder(services: WorkerServices) -> None:
    folder = os.open(services.scratch.path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):  # what systemd-tmpfiles tries before it cleans a folder
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


def test_a_worker_that_starts_during_anothers_sweep_takes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not made:  # between the new folder and its lock
            folder = Path(f"/proc/self/fd/{handle}").readlink().parent
            made.append(folder)
            shutil.rmtree(folder)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    scratch = ScratchFolder(tmp_path)
    assert scratch.path not in made
    assert scratch.path.exists()
    scratch.check()
    scratch.close()


def test_a_fault_after_the_record_does_not_fail_the_task(
    services: WorkerServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerMetrics, "observe", broken)
    done = Done(output=b'{"payload": 1}', artifacts={}, seconds=0.0)
    delivery = replace(DELIVERY, tag=4)
    assert settled(services, delivery, lambda _body: None, run=lambda *_, **__: done) == ["ack"]
    assert cast(ForgetfulPublisher, services.publisher).sent == []
    result = services.results.load("default", "b.7")
    assert result is not None
    assert (result.status, result.output) == ("succeeded", {"payload": 1})


def test_where_no_record_can_be_kept_it_is_settled_all_the_same(
    services: WorkerServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.results, "save", broken)
    assert settled(services, replace(DELIVERY, tag=2)) == ["ack"]
    assert len(cast(ForgetfulPublisher, services.publisher).sent) == 1
    assert services.results.load("default", "b.7") is None


@pytest.fixture
def index(services: WorkerServices) -> Iterator[BatchIndex]:
    """Line 7 of the batch is fed."""
    index = BatchIndex(services.status)
    index.forget("default", "b", high_water=7)
    index.open("default", "b", token="t", line=7, offset=0, total=7, cancelled=False)
    index.mark("default", "b", "fed", [7])
    yield index
    services.status.write(lambda redis: redis.delete("inferq:t:default:b.7"))


def test_a_line_whose_id_an_ended_task_has_ends_without_a_trace(
    services: WorkerServices, index: BatchIndex
) -> None:
    other = parse_task({"task_id": "b.7", "task_type": "echo", "payload": "another"})
    now = datetime.now(UTC)
    kept = services.results.save(
        Result.failure(other, InvalidTask("as you wish"), attempts=1, finished_at=now, digest=other.digest())
    )
    assert settled(services, DELIVERY, prepare=lambda _body: None) == ["ack"]
    assert services.results.load("default", "b.7") == kept
    assert services.status.get("default", "b.7") is None
    assert index.unended("default", "b") == []
    standing = index.look("default", "b")
    assert standing is not None
    assert standing.counts.failed == 1


def test_a_line_whose_id_a_running_task_has_leaves_that_alone(
    services: WorkerServices, index: BatchIndex
) -> None:
    other = parse_task({"task_id": "b.7", "task_type": "echo", "payload": "another"})
    begin_run(services.status, other)
    before = services.status.get("default", "b.7")
    assert settled(services, DELIVERY, prepare=lambda _body: None) == ["ack"]
    assert services.status.get("default", "b.7") == before
    assert index.unended("default", "b") == [7]  # the recount tells it, once the other has ended


def test_an_idle_worker_finds_out_that_redis_refuses_writes(
    services: WorkerServices, redis_node: Redis
) -> None:
    services.status = StatusIndex.from_settings(StorageSettings(redis_url=redis_node.url))
    with redis.Redis.from_url(redis_node.url) as client:
        client.config_set("maxmemory", "1")
    services.look_for_redis()
    assert ["refuses writes" in reason for reason in services.pauses()] == [True]
    services.status.close()


def test_a_task_that_the_gateway_ended_is_reported_with_its_metadata(services: WorkerServices) -> None:
    document = {**TASK, "task_id": "gone", "metadata": {"order": 7}, "callback_url": "http://127.0.0.1/x"}
    task = parse_task({**document})
    cancelled = Result.failure(
        task, InvalidTask("cancelled"), attempts=0, finished_at=datetime.now(UTC), status="cancelled"
    )
    services.results.save(cancelled.model_copy(update={"metadata": {}}))
    delivery = replace(DELIVERY, body=json.dumps(document).encode())
    assert settled(services, delivery, prepare=lambda _body: None) == ["ack"]
    (callback,) = cast(ForgetfulPublisher, services.publisher).sent
    assert b"task.cancelled" in callback.body
    assert b"order" in callback.body
