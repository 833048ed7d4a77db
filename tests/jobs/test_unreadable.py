"""Messages that are no jobs, on a real RabbitMQ: kept where an operator sees them, and they stop nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from inferq.broker import ASSEMBLE_JOB, FEED_JOB, QUEUE_JOBS, JobQueue, connect, job_message
from inferq.broker.celery_app import celery_app
from inferq.consumers.batches import jobs as batch_jobs
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.nightly import jobs as nightly_jobs
from tests.celery_worker import working
from tests.waiting import eventually

ARGUMENTS: dict[str, dict[str, Any]] = {
    "callbacks.deliver": {"callback": {"url": "http://127.0.0.1:1/"}},
    "batches.feed": {
        "tenant": "default", "batch_id": "b", "chain": "c", "part": 0, "line": 0, "offset": 0,
    },
    "batches.assemble": {"tenant": "default", "batch_id": "b", "error": None},
    "nightly.start": {"schedule": {}, "scheduled_at": "2026-01-01T00:00:00+00:00"},
    "nightly.watch": {"run": {}, "since": "2026-01-01T00:00:00+00:00"},
}  # fmt: skip


def unreadable(name: str) -> list[tuple[bytes, dict[str, Any], dict[str, str]]]:
    """Bodies, headers and properties of messages of which none is a job of this name."""
    good, headers = json.dumps([[], ARGUMENTS[name], {}]).encode(), {"task": name, "id": "y1"}
    as_json = {"content_type": "application/json", "content_encoding": "utf-8"}
    bodies = [
        b"", b"{}", b"{", b"null", b'"args"', b"[[],{}]", b"[5,6,7]", b"[[],null,{}]", b"[[],[],{}]",
        b"[null,{},{}]", b"[[],{},null]", b"[[],{},{},{}]", b'["args",{},{}]', b"\xff\xfe", b"[" * 100_000,
        b'[[],{"nope":1},{}]', b"[[1,2,3,4,5,6],{},{}]", good.replace(b"{}]", b'{"chain":[5]}]'),
        b'{"task":"%b","id":"y1","args":[],"kwargs":{}}' % name.encode(),
    ]  # fmt: skip
    odd_headers: list[dict[str, Any]] = [
        {}, {"task": name}, {"id": "y1"}, {"task": name, "id": None}, {"task": name, "id": 5},
        {"task": [name], "id": "y1"}, {"task": "nope", "id": "y1"}, {"task": "celery.group", "id": "y1"},
        {"task": 5, "id": "y1"}, headers | {"retries": "x"}, headers | {"retries": -1},
        headers | {"compression": "zlib"},
    ]  # fmt: skip
    return [
        *((body, headers, as_json) for body in bodies),
        *((good, odd, as_json) for odd in odd_headers),
        (good, headers, {"content_type": "application/x-python-serialize", "content_encoding": "binary"}),
        (good, headers, {}),
    ]


@pytest.fixture
def channel(services: BatchServices) -> Iterator[BlockingChannel]:
    connection = connect(services.broker, name="test")
    yield connection.channel()
    connection.close()


def put(channel: BlockingChannel, queue: str, body: bytes, headers: dict[str, Any], **about: str) -> None:
    properties = pika.BasicProperties(delivery_mode=2, headers=headers, **about)
    channel.basic_publish("", queue, body, properties)


@pytest.mark.parametrize("name", QUEUE_JOBS["inference.batches"])
def test_what_is_no_job_is_kept_and_what_comes_behind_is_done(
    services: BatchServices, channel: BlockingChannel, name: str
) -> None:
    app = celery_app(services.broker)
    done = threading.Event()
    batch_jobs.add_jobs(app, services)
    nightly_jobs.add_jobs(app, services)

    @app.task(name="test.done", shared=False)
    def be_done() -> None:
        done.set()

    queue: JobQueue = "inference.batches"
    messages = unreadable(name)
    for body, headers, about in messages:
        put(channel, queue, body, headers, **about)
    last = job_message("test.done", queue, {}, job_id="done")
    put(channel, queue, last.body, dict(last.headers), content_type="application/json")
    kept: list[bytes] = []

    def all_kept() -> bool:
        method, _, body = channel.basic_get("inference.unroutable", auto_ack=True)
        if method is not None and body is not None:
            assert method.routing_key == queue
            kept.append(body)
        return len(kept) >= len(messages)

    with working(app):
        assert done.wait(20)
        eventually(all_kept)
    assert sorted(kept) == sorted(body for body, _, _ in messages)
    assert channel.queue_declare(queue, passive=True).method.message_count == 0


@pytest.mark.parametrize("name", [FEED_JOB, ASSEMBLE_JOB])
def test_an_argument_of_a_later_version_puts_no_job_aside(
    services: BatchServices, channel: BlockingChannel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    app = celery_app(services.broker)
    batch_jobs.add_jobs(app, services)
    arguments = ARGUMENTS[name] | {"from_a_later_version": 1}
    # It has no batch, and is given up at once: it has been looked for often enough.
    message = job_message(name, "inference.batches", arguments, job_id="later", retries=150)
    put(channel, "inference.batches", message.body, dict(message.headers), content_type="application/json")
    with working(app):
        eventually(lambda: "its record is missing" in caplog.text)
    for queue in ("inference.batches", "inference.unroutable"):
        assert channel.queue_declare(queue, passive=True).method.message_count == 0


@pytest.mark.parametrize(
    "odd",
    [
        {"timelimit": 5}, {"timelimit": ["x", {}]}, {"eta": 5}, {"eta": "9999-12-31T23:59:59"},
        {"expires": "x"}, {"stamped_headers": 5}, {"group": {}}, {"root_id": 5}, {"shadow": [1]},
        {"delivery_info": 5}, {"args": 5}, {"called_directly": True},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_no_job_has_are_not_heeded(
    services: BatchServices, channel: BlockingChannel, odd: dict[str, Any]
) -> None:
    app = celery_app(services.broker)
    done = threading.Event()

    @app.task(name="test.done", shared=False)
    def be_done() -> None:
        done.set()

    message = job_message("test.done", "inference.batches", {}, job_id="done")
    headers = dict(message.headers) | odd
    put(channel, "inference.batches", message.body, headers, content_type="application/json")
    with working(app):
        assert done.wait(20)
