"""Jobs of batches that fail, on a real RabbitMQ: they come again, later and later, and hold up nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from celery import Celery, Task

from inferq.broker import job_message
from inferq.broker.celery_app import celery_app
from inferq.consumers.batches import retry
from inferq.consumers.batches.retry import resend_unless_done
from inferq.consumers.batches.services import BatchServices
from inferq.schemas import InvalidTask, Outage
from tests.celery_worker import working

THREADS = 4


@pytest.fixture
def app(services: BatchServices) -> Celery:
    return celery_app(services.broker)


def failing(app: Celery, here: BatchServices, fail: Callable[[int], None]) -> None:
    """Add `test.fails`; `fail` gets how often the job has failed before."""

    @app.task(name="test.fails", bind=True, shared=False)
    def fails(self: Task, number: int) -> None:
        resend_unless_done(self, here, f"batch {number}", lambda: fail(self.request.retries))


@pytest.mark.parametrize("error", [OSError("disk"), InvalidTask("broken"), Outage("away")])
def test_broken_batches_hold_up_no_other(
    app: Celery,
    services: BatchServices,
    error: Exception,
) -> None:
    failed = threading.Semaphore(0)
    done = threading.Event()

    def fail(_failures: int) -> None:
        failed.release()
        raise error

    failing(app, services, fail)

    @app.task(name="test.done", shared=False)
    def be_done() -> None:
        done.set()

    for number in range(5 * THREADS):
        message = job_message("test.fails", "inference.batches", {"number": number}, job_id=f"b{number}")
        services.confirm(message)
    with working(app):
        for _ in range(5 * THREADS):
            assert failed.acquire(timeout=20)
        services.confirm(job_message("test.done", "inference.batches", {}, job_id="done"))
        assert done.wait(retry._AGAIN_SECONDS / 2)


def test_a_job_that_failed_comes_again_as_it_was(
    app: Celery, services: BatchServices, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(retry, "_AGAIN_SECONDS", 0.5)
    came: list[int] = []
    done = threading.Event()

    def fail(failures: int) -> None:
        came.append(failures)
        if failures < 2:
            raise ValueError("as you wish")
        done.set()

    failing(app, services, fail)
    services.confirm(job_message("test.fails", "inference.batches", {"number": 7}, job_id="b7"))
    with working(app):
        assert done.wait(20)
    assert came == [0, 1, 2]
    told = [record for record in caplog.records if "as you wish" in record.getMessage()]
    assert [(bool(record.exc_info), "batch 7" in record.getMessage()) for record in told] == [
        (True, True),
        (False, True),
    ]


def test_a_job_that_cannot_be_sent_again_is_given_back(
    app: Celery,
    services: BatchServices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "_AGAIN_SECONDS", 0.1)
    sent: list[object] = []
    done = threading.Event()
    confirm = BatchServices.confirm

    def refuse(here: BatchServices, message: object) -> None:
        sent.append(message)
        raise Outage("RabbitMQ is away")

    def fail(_failures: int) -> None:
        if len(sent) < 2:
            raise ValueError("as you wish")
        done.set()

    failing(app, services, fail)
    confirm(services, job_message("test.fails", "inference.batches", {"number": 7}, job_id="b7"))
    monkeypatch.setattr(BatchServices, "confirm", refuse)
    with working(app):
        assert done.wait(20)


def test_the_pause_grows_to_minutes_and_is_short_while_something_is_away() -> None:
    faults = [retry._pause(failures, retry._FAULT_SECONDS) for failures in (0, 1, 4, 20, 1_000_000)]
    assert faults == sorted(faults[:3]) + faults[3:]
    assert 2 < faults[0] <= 3
    assert all(480 <= pause <= 600 for pause in faults[3:])
    assert retry._pause(1_000_000, retry._OUTAGE_SECONDS) <= 30
