"""What RabbitMQ itself dead-letters ends for its owner, like what a worker fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pika
import pytest

from inferq.broker import BrokerSettings, Delivery, Message, connect, topology_for
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.jobs.dropped import DroppedTasks, drop_error
from inferq.schemas import Result, parse_task
from inferq.storage import LocalStore, ResultStore, StatusOutage
from tests.waiting import eventually

TASK = {"task_id": "late", "task_type": "echo", "payload": 1, "callback_url": "http://127.0.0.1:9/x"}


@pytest.fixture
def dropped(services: BatchServices) -> Iterator[DroppedTasks]:
    dropped = DroppedTasks(services)
    dropped.start()
    yield dropped
    dropped.stop()


def test_a_task_that_expires_in_its_queue_fails_with_a_record_and_a_callback(
    services: BatchServices, dropped: DroppedTasks
) -> None:
    with closing(connect(services.broker, name="test")) as connection:
        channel = connection.channel()
        topology_for(["echo"]).apply(channel)
        channel.confirm_delivery()
        channel.basic_publish(
            "inference.tasks", "task_type.echo", json.dumps(TASK).encode(),
            pika.BasicProperties(delivery_mode=2, message_id="late", expiration="1"), mandatory=True,
        )  # fmt: skip
        result = eventually(lambda: services.results.load("default", "late"))
        assert (result.status, result.error.code, result.attempts) == ("failed", "expired", 1)
        status = eventually(lambda: services.status.get("default", "late"))
        assert status.state == "failed"
        body = eventually(lambda: channel.basic_get("inference.callbacks", auto_ack=True)[2])
        assert b"task.failed" in body
        # The dead letter stays for a redrive.
        assert (
            eventually(lambda: channel.basic_get("inference.dead.echo", auto_ack=True)[2])
            == json.dumps(TASK).encode()
        )


def test_a_copy_that_expires_while_another_runs_leaves_the_end_to_that_run(
    services: BatchServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**TASK, "task_id": "twin"}
    task = parse_task(content)
    digest, now = task.digest(), datetime.now(UTC)
    begun = services.status.begin_pipelined(
        task, attempt=1, redrives=0, worker="w", started_at=now, digest=digest, run="another"
    )()
    assert not begun.other_run
    put_back: list[Message] = []
    confirm = services.confirm

    def noted(message: Message) -> None:
        put_back.append(message)
        confirm(message)

    monkeypatch.setattr(BatchServices, "confirm", lambda _, message: noted(message))
    dropped = DroppedTasks(services)
    dropped.start()
    try:
        with closing(connect(services.broker, name="test")) as connection:
            channel = connection.channel()
            topology_for(["echo"]).apply(channel)
            channel.basic_publish(
                "inference.tasks", "task_type.echo", json.dumps(content).encode(),
                pika.BasicProperties(delivery_mode=2, message_id="twin", expiration="1"),
            )  # fmt: skip

            def looked_twice() -> bool:
                services.status.cancel_requested("default", "twin", run="another")  # a sign of life
                return len(put_back) > 1

            eventually(looked_twice)
            assert {message.exchange for message in put_back} == {"inference.dropped"}
            assert services.results.load("default", "twin") is None
            done = Result(
                task_id="twin", task_type="echo", tenant="default", status="succeeded", attempts=1,
                finished_at=datetime.now(UTC), digest=digest,
            )  # fmt: skip
            services.results.save(done)
            services.status.ended(done)
            ends = eventually(
                lambda: [each.body for each in put_back if each.exchange != "inference.dropped"]
            )
            assert b"task.succeeded" in ends[0]
            assert services.results.load("default", "twin") == done
    finally:
        dropped.stop()


def delivery(body: dict[str, Any] = TASK, **headers: Any) -> Delivery:
    death = {"reason": "expired", "queue": "inference.echo.normal", "count": 1}
    return Delivery(
        queue="inference.dropped", tag=1, epoch=1, body=json.dumps(body).encode(),
        routing_key="task_type.echo.normal", headers={"x-death": [death], **headers}, redelivered=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"x-death": [{"reason": "expired", "queue": "q"}]}, "expired"),
        ({"x-death": [{"reason": "delivery_limit", "queue": "q"}, {"reason": "expired"}]}, "poison"),
        ({"x-death": [{"reason": "maxlen", "queue": "q"}]}, "dropped"),
        ({"x-death": [{"reason": "rejected", "queue": "q"}]}, "dropped"),
        ({"x-death": ["odd"]}, None),
        ({"x-death": "odd"}, None),
        ({"x-dead-reason": "not_json"}, None),  # a worker's dead letter
    ],
)
def test_the_last_death_says_why(headers: dict[str, Any], code: str | None) -> None:
    made = Delivery(queue="", tag=1, epoch=1, body=b"", routing_key="", headers=headers, redelivered=False)
    error = drop_error(made)
    assert (None if error is None else error.code) == code


class Site(SimpleNamespace):
    """Services that keep what is sent; their index is away."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[Message] = []
        store = LocalStore(folder / "store", fsync=False)
        status = SimpleNamespace(ended=self._away, get=lambda *_: None, lease=self._away)
        super().__init__(
            broker=BrokerSettings(), results=ResultStore(store), publisher=None, status=status,
            confirm=self.sent.append,
        )  # fmt: skip

    def _away(self, *_: object) -> None:
        raise StatusOutage("Redis is away")

    def end(self, dropped: Delivery) -> Result | None:
        DroppedTasks(cast(BatchServices, self)).end(dropped)
        return cast(Result | None, self.results.load("default", "late"))


def test_a_worker_s_dead_letter_and_a_finished_task_stay_as_they_are(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.end(delivery(**{"x-death": None, "x-dead-reason": "broken"})) is None
    assert site.sent == []
    task = parse_task(TASK)
    done = Result.model_validate_json(
        json.dumps(
            {
                "task_id": "late", "task_type": "echo", "tenant": "default", "status": "succeeded", "attempts": 1,
                "finished_at": "2026-11-30T12:00:00Z", "digest": task.digest(),
            }
        )
    )  # fmt: skip
    site.results.save(done)
    assert site.end(delivery()) == done
    assert b"task.succeeded" in site.sent[0].body  # at least once, and under the same id


def test_another_task_s_end_is_not_reported_to_the_owner_of_a_dropped_one(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.end(delivery({**TASK, "payload": 2}))
    site.sent.clear()
    assert site.end(delivery()) is not None
    assert site.sent == []


def test_a_dropped_message_that_is_no_task_ends_the_task_that_it_names(tmp_path: Path) -> None:
    site = Site(tmp_path)
    result = site.end(delivery({**TASK, "payload": 1, "delay": "x"}))
    assert result is not None
    assert (result.status, result.digest) == ("failed", None)
    assert b"task.failed" in site.sent[0].body
