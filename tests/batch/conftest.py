"""Batches with a real broker, Redis and store around them, fed in this process, and a quick worker."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from inferq.broker import BrokerSettings, connect, topology_for
from inferq.consumers.batches.assembly import end
from inferq.consumers.batches.feeder import Assemble, GoOn, Next, Nothing, Slice
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.batches.settings import BatchSettings
from inferq.schemas import Batch, BatchSummary, InvalidTask, Result, installed_types, parse_task
from inferq.storage import StatusIndex, StorageSettings, errors_key, output_key, upload_key
from inferq.storage.batches.sources import Cursor
from tests.conftest import RabbitMQ
from tests.runs import begin_run

START = Cursor()


@dataclass
class BatchSite:
    """Where batches are fed; `ran` counts how often each task began."""

    services: BatchServices
    redis: redis.Redis
    ran: dict[str, int] = field(default_factory=dict)

    def change(self, **changes: Any) -> None:
        """Go on with other services: of `settings` and `storage` only what is named here changes."""
        for name in ("settings", "storage"):
            if name in changes:
                changes[name] = getattr(self.services, name).model_copy(update=changes[name])
        self.services.close()
        self.services = replace(self.services, **changes)

    def batch(self, content: bytes, **more: Any) -> Batch:
        """A batch over an upload of this content, on record."""
        name = f"{uuid.uuid4().hex}.jsonl"
        self.services.store.put(upload_key("default", name), content)
        return self.batch_of(f"inferq:{name}", **more)

    def batch_of(self, source: str, **more: Any) -> Batch:
        said = {"batch_id": f"b{uuid.uuid4().hex[:8]}", "task_type": "echo", **more}
        return self.services.batches.create(Batch(source=source, created_at=datetime.now(UTC), **said))

    def slice(
        self,
        batch: Batch,
        cursor: Cursor = START,
        *,
        chain: str = "c",
        part: int = 0,
    ) -> Next:
        return Slice(self.services, batch.tenant, batch.batch_id, chain=chain, part=part, cursor=cursor).run()

    def feed(self, batch: Batch, *, between: Callable[[Cursor], None] = lambda _: None) -> Assemble:
        """Slice after slice, until everything has ended."""
        cursor, part = Cursor(), 0
        while True:
            match self.slice(batch, cursor, part=part):
                case GoOn(cursor, _):
                    part += 1
                    assert part < 200
                    between(cursor)
                case Assemble() as assemble:
                    return assemble
                case Nothing():
                    raise AssertionError("nothing was to be fed")

    def finish(self, batch: Batch, **more: Any) -> BatchSummary:
        error = self.feed(batch, **more).error
        return end(self.services, batch, error)

    def output(self, batch: Batch) -> list[dict[str, Any]]:
        return self._lines(output_key(batch.tenant, batch.batch_id))

    def errors(self, batch: Batch) -> list[dict[str, Any]]:
        return self._lines(errors_key(batch.tenant, batch.batch_id))

    def _lines(self, key: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.services.store.get(key).splitlines()]

    def depth(self) -> int:
        connection = connect(self.services.broker, name="test")
        count = connection.channel().queue_declare("inference.echo.normal", passive=True).method.message_count
        connection.close()
        return int(count)


class QuickWorker(threading.Thread):
    """Ends the tasks in the queue as a worker does, without an engine. The payload says which ones fail (`fail`), and
    which ones the result cache answers (`again`)."""

    def __init__(self, site: BatchSite) -> None:
        super().__init__(daemon=True)
        self._site = site
        self._done = threading.Event()
        self.tells_redis = True
        self.spares: set[str] = set()
        self.headers: list[dict[str, Any]] = []
        self.status = StatusIndex.from_settings(site.services.storage)

    def run(self) -> None:
        connection = connect(self._site.services.broker, name="quick worker")
        channel = connection.channel()
        topology_for(installed_types()).apply(channel)
        channel.basic_qos(prefetch_count=50)
        for method, properties, body in channel.consume("inference.echo.normal", inactivity_timeout=0.05):
            if self._done.is_set():
                break
            if method is not None:
                self.headers.append(properties.headers or {})
                self._end(body)
                channel.basic_ack(method.delivery_tag)
        channel.cancel()
        connection.close()

    def _end(self, body: bytes) -> None:
        task = parse_task(body)
        if task.task_id in self.spares:
            return
        results, now = self._site.services.results, datetime.now(UTC)
        kept = results.load(task.tenant, task.task_id)
        if kept is None:
            cancel = self.tells_redis and begin_run(self.status, task).cancel_requested
            payload = task.payload  # type: ignore[attr-defined]
            if cancel or payload == "fail":
                error = InvalidTask("as you wish", code="cancelled" if cancel else "wished")
                ended = Result.failure(
                    task, error, attempts=1, finished_at=now, status="cancelled" if cancel else "failed"
                )
            else:
                self._site.ran[task.task_id] = self._site.ran.get(task.task_id, 0) + 1
                ended = Result(
                    task_id=task.task_id, task_type=task.task_type, tenant=task.tenant, status="succeeded",
                    output={"payload": payload}, attempts=1, batch_id=task.batch_id,
                    batch_line=task.batch_line, metadata=task.metadata, finished_at=now, digest=task.digest(),
                    cached=payload == "again",
                )  # fmt: skip
            kept = results.save(ended)
        if self.tells_redis:
            self.status.ended(kept)

    def stop(self) -> None:
        self._done.set()
        self.join(20)
        self.status.close()


@pytest.fixture(scope="package")
def batches_amqp_url(shared_rabbitmq: RabbitMQ) -> Iterator[str]:
    """A virtual host for all tests of batches: its queues take a second to declare."""
    with shared_rabbitmq.vhost("batches") as url:
        yield url


@pytest.fixture
def site(batches_amqp_url: str, redis_url: str, tmp_path: Path) -> Iterator[BatchSite]:
    address = urlsplit(redis_url)._replace(path="/9").geturl()
    services = BatchServices(
        BatchSettings(batch_slice=5, batch_doubt=0.5),
        StorageSettings(
            redis_url=address,
            store_url=(tmp_path / "store").as_uri(),
            store_fsync=False,
            api_url="http://api",
        ),
        BrokerSettings(amqp_url=batches_amqp_url),
    )
    line = connect(services.broker, name="test")
    topology_for(installed_types()).apply(line.channel())
    line.channel().queue_purge("inference.echo.normal")
    line.close()
    connection = redis.Redis.from_url(address)
    site = BatchSite(services, connection)
    yield site
    site.services.close()
    connection.flushdb()
    connection.close()


@pytest.fixture
def worker(site: BatchSite) -> Iterator[QuickWorker]:
    worker = QuickWorker(site)
    worker.start()
    yield worker
    worker.stop()
