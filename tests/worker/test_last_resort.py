"""What becomes of a delivery where even the failing of it fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferq.broker import Delivery, Message
from inferq.consumers.worker.inputs import fetch_inputs
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.scratch import ScratchFolder
from inferq.consumers.worker.services import Surroundings
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


@pytest.fixture
def around(redis_url: str, tmp_path: Path) -> Iterator[Surroundings]:
    store = LocalStore(tmp_path / "store", fsync=False)
    storage = StorageSettings(redis_url=redis_url, store_url=(tmp_path / "store").as_uri())
    scratch = ScratchFolder(tmp_path / "scratch")
    around = Surroundings(
        settings=WorkerSettings(), task_type=get_type("echo"), store=store, results=ResultStore(store),
        fetcher=Fetcher(store, storage), status=StatusIndex.from_settings(storage),
        publisher=cast(Any, ForgetfulPublisher()), metrics=WorkerMetrics(),
        scratch=scratch,
    )  # fmt: skip
    yield around
    around.status.close()
    scratch.close()


def settled(
    around: Surroundings,
    delivery: Delivery,
    prepare: Callable[..., None] = broken,
    *,
    shared: bool = False,
    held: bool = True,
) -> list[str]:
    """Complete a delivery by an engine that breaks; gives what was done with it."""
    done: list[str] = []
    consumer = SimpleNamespace(
        ack=lambda _delivery, *, more, gives_way: done.append("ack, giving way" if gives_way else "ack"),
        give_back=lambda _delivery: done.append("give back"),
        holds=lambda _delivery: held,
    )
    seat = SimpleNamespace(
        engine=SimpleNamespace(usable=True, info=None, prepare=prepare),
        usable=True,
        shared=shared,
        take=lambda _timeout: True,
        leave=lambda: done.append("leave"),
    )
    TaskRun(around, cast(Any, consumer), cast(Any, seat), delivery, "normal").complete()
    done.remove("leave")  # once, or the next task would wait for ever
    assert "leave" not in done
    return done


DELIVERY = Delivery(
    queue="inference.echo.normal", tag=1, epoch=1, body=json.dumps(TASK).encode(),
    routing_key="task_type.echo.normal", headers={}, redelivered=False,
)  # fmt: skip


def test_it_leaves_a_dead_letter_and_a_record_so_that_its_batch_ends(around: Surroundings) -> None:
    assert settled(around, DELIVERY) == ["ack"]
    (letter,) = cast(ForgetfulPublisher, around.publisher).sent
    assert letter.exchange == "inference.dead"
    result = around.results.load("default", "b.7")
    assert result is not None
    assert (result.status, result.batch_id, result.batch_line) == ("failed", "b", 7)
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("worker_error", True)
    status = around.status.get("default", "b.7")
    assert status is None or status.state == "failed"


def test_a_slot_with_another_task_in_hand_gives_way_from_the_ack_on(around: Surroundings) -> None:
    assert settled(around, replace(DELIVERY, tag=3), shared=True) == ["ack, giving way"]


def test_what_was_lost_before_its_run_begins_is_another_workers(around: Surroundings) -> None:
    ran: list[str] = []
    assert settled(around, DELIVERY, ran.append, held=False) == ["give back"]
    assert around.results.load("default", "b.7") is None
    assert cast(ForgetfulPublisher, around.publisher).sent == []


def test_what_cannot_even_be_dead_lettered_is_not_acknowledged(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(around.publisher, "publish", broken)
    assert settled(around, DELIVERY) == ["give back"]


def test_a_pause_is_over_however_the_call_ends(around: Surroundings) -> None:
    for end in (InvalidTask("no such upload"), None):
        calls: list[Exception | None] = [StoreOutage("away"), end]

        def call(calls: list[Exception | None] = calls) -> None:
            if (error := calls.pop(0)) is not None:
                raise error

        with suppress(InvalidTask):
            around.patiently("object store", call)
        assert around.pauses() == []
        assert around.metrics.paused.labels("object store")._value.get() == 0


def test_a_full_disk_burns_no_attempt(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(around.scratch.path)
    full = SimpleNamespace(f_bavail=10, f_frsize=4096, f_files=disk.f_files, f_favail=disk.f_favail)
    seen: list[list[str]] = []

    def statvfs(_path: Path) -> Any:
        seen.append(around.pauses())
        return full if len(seen) < 3 else disk

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(Task, "inputs", lambda _: {"file_url": "data:,x"})
    task = parse_task(TASK)
    inputs = fetch_inputs(around, task, Path(around.scratch.path) / "run", lambda: None)
    assert inputs.files["file_url"].bytes == 1
    assert "is full" in seen[-1][0]
    assert around.pauses() == []


def test_where_no_record_can_be_kept_it_is_settled_all_the_same(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(around.results, "save", broken)
    assert settled(around, replace(DELIVERY, tag=2)) == ["ack"]
    assert len(cast(ForgetfulPublisher, around.publisher).sent) == 1
    assert around.results.load("default", "b.7") is None


@pytest.fixture
def index(around: Surroundings) -> Iterator[BatchIndex]:
    """Line 7 of the batch is fed."""
    index = BatchIndex(around.status)
    index.forget("default", "b", reaches=7)
    index.open("default", "b", token="t", line=7, offset=0, total=7, cancelled=False)
    index.mark("default", "b", "fed", [7])
    yield index
    around.status.ask(lambda redis: redis.delete("inferq:t:default:b.7"))


def test_a_line_whose_id_an_ended_task_has_ends_without_a_trace(
    around: Surroundings, index: BatchIndex
) -> None:
    other = parse_task({"task_id": "b.7", "task_type": "echo", "payload": "another"})
    now = datetime.now(UTC)
    kept = around.results.save(
        Result.failure(other, InvalidTask("as you wish"), attempts=1, finished_at=now, digest=other.digest())
    )
    assert settled(around, DELIVERY, prepare=lambda _body: None) == ["ack"]
    assert around.results.load("default", "b.7") == kept
    assert around.status.get("default", "b.7") is None
    assert index.unended("default", "b") == []
    standing = index.look("default", "b")
    assert standing is not None
    assert standing.counts.failed == 1


def test_a_line_whose_id_a_running_task_has_leaves_that_alone(
    around: Surroundings, index: BatchIndex
) -> None:
    other = parse_task({"task_id": "b.7", "task_type": "echo", "payload": "another"})
    around.status.begin(other, attempt=1, redrives=0, worker="w", started_at=datetime.now(UTC))
    before = around.status.get("default", "b.7")
    assert settled(around, DELIVERY, prepare=lambda _body: None) == ["ack"]
    assert around.status.get("default", "b.7") == before
    assert index.unended("default", "b") == [7]  # the recount tells it, once the other has ended
