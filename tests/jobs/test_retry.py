"""Jobs of batches that fail, on a real RabbitMQ: they come again, later and later, and hold up nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace

import pytest
from celery import Celery, Task

from inferq.broker import job_message
from inferq.broker.celery_app import celery_app
from inferq.consumers.batches.retry import FAULT_SECONDS, OUTAGE_SECONDS, resend_unless_done, retry_pause
from inferq.consumers.batches.services import BatchServices, Pauses
from inferq.schemas import InvalidTask, Outage
from inferq.storage.batches.store import RecordMissing
from tests.celery_worker import working

THREADS = 4


@pytest.fixture
def app(services: BatchServices) -> Celery:
    return celery_app(services.broker)


@dataclass
class Runs:
    """The runs of a job: how often it had failed before each of them, and whether one has succeeded."""

    failures: list[int] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


def failing(app: Celery, here: BatchServices, fail: Callable[[int], None]) -> Runs:
    """Add `test.fails`; `fail` gets how often the job has failed before."""
    runs = Runs()

    def run(failures: int) -> None:
        runs.failures.append(failures)
        fail(failures)
        runs.done.set()

    @app.task(name="test.fails", bind=True, shared=False)
    def fails(self: Task, number: int) -> None:
        resend_unless_done(self, here, f"batch {number}", lambda: run(self.request.retries))

    return runs


@pytest.mark.parametrize("error", [OSError("disk"), InvalidTask("broken"), Outage("away")])
def test_broken_batches_hold_up_no_other(
    app: Celery,
    services: BatchServices,
    error: Exception,
) -> None:
    """A pause lasts longer than the test: whatever waited for it on a thread would hold up all others."""
    failed = threading.Semaphore(0)
    done = threading.Event()

    def fail(_failures: int) -> None:
        failed.release()
        raise error

    patient = replace(services, pauses=Pauses(resend=600))
    failing(app, patient, fail)

    @app.task(name="test.done", shared=False)
    def be_done() -> None:
        done.set()

    for number in range(5 * THREADS):
        message = job_message("test.fails", "inference.batches", {"number": number}, job_id=f"b{number}")
        services.confirm(message)
    with closing(patient), working(app):
        for _ in range(5 * THREADS):
            assert failed.acquire(timeout=60)
        services.confirm(job_message("test.done", "inference.batches", {}, job_id="done"))
        assert done.wait(60)


def test_a_job_that_failed_comes_again_as_it_was(
    app: Celery, services: BatchServices, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(failures: int) -> None:
        if failures < 2:
            raise ValueError("as you wish")

    runs = failing(app, services, fail)
    services.confirm(job_message("test.fails", "inference.batches", {"number": 7}, job_id="b7"))
    with working(app):
        assert runs.done.wait(60)
    assert runs.failures == [0, 1, 2]
    told = [record for record in caplog.records if "as you wish" in record.getMessage()]
    assert [(bool(record.exc_info), "batch 7" in record.getMessage()) for record in told] == [
        (True, True),
        (False, True),
    ]


def test_a_missing_record_is_looked_for_again_and_given_up_after_a_day(
    app: Celery, services: BatchServices, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(failures: int) -> None:
        if failures != 1:
            raise RecordMissing("its record is missing")

    runs = failing(app, services, fail)
    for number, retries in ((7, 150), (8, 0)):
        message = job_message(
            "test.fails", "inference.batches", {"number": number}, job_id=f"b{number}", retries=retries
        )
        services.confirm(message)
    with working(app):
        assert runs.done.wait(60)
    assert sorted(runs.failures) == [0, 1, 150]
    assert [line for line in caplog.messages if "given up" in line] == [
        "batch 7: given up: its record is missing"
    ]


def test_a_job_that_cannot_be_sent_again_is_given_back(
    app: Celery,
    services: BatchServices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[object] = []
    confirm = BatchServices.confirm

    def refuse(here: BatchServices, message: object) -> None:
        sent.append(message)
        raise Outage("RabbitMQ is away")

    def fail(_failures: int) -> None:
        if len(sent) < 2:
            raise ValueError("as you wish")

    runs = failing(app, services, fail)
    confirm(services, job_message("test.fails", "inference.batches", {"number": 7}, job_id="b7"))
    monkeypatch.setattr(BatchServices, "confirm", refuse)
    with working(app):
        assert runs.done.wait(60)


def test_the_pause_grows_to_minutes_and_is_short_while_something_is_away() -> None:
    faults = [retry_pause(failures, 3.0, FAULT_SECONDS) for failures in (0, 1, 4, 20, 1_000_000)]
    assert faults == sorted(faults[:3]) + faults[3:]
    assert 2 < faults[0] <= 3
    assert all(480 <= pause <= 600 for pause in faults[3:])
    assert retry_pause(1_000_000, 3.0, OUTAGE_SECONDS) <= 30
