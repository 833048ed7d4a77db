"""Runs from their start to what is told of their nights, with the real jobs on a real broker."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pika
import pytest
import redis

from inferq.broker import BrokerSettings, connect, topology_for
from inferq.broker.celery_app import celery_app
from inferq.consumers.batches import jobs as batch_jobs
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.batches.settings import BatchSettings
from inferq.consumers.nightly import jobs
from inferq.consumers.nightly.jobs import Watcher
from inferq.consumers.nightly.start import Starter
from inferq.producer.nightly.beat import start_message
from inferq.schemas import (
    Batch,
    BatchSummary,
    InvalidTask,
    Night,
    Result,
    installed_types,
    parse_task,
)
from inferq.schemas.schedule import Schedule, run_id_of
from inferq.storage import StatusIndex, StorageSettings, errors_key, output_key
from inferq.storage.nightly_runs import Run, RunLog
from tests.celery_worker import working
from tests.conftest import RabbitMQ
from tests.waiting import consistently, eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_databases = itertools.cycle(range(10, 14))
HOOK = "https://example.com/nights"


class Site:
    """Services for runs; `work` ends the tasks in the queue as a worker would, without an engine."""

    def __init__(self, services: BatchServices, s3: S3Client, bucket: str) -> None:
        self.services = services
        self.s3 = s3
        self.bucket = bucket
        self.connection = connect(services.broker, name="test")
        self.channel = self.connection.channel()
        topology_for(installed_types()).apply(self.channel)
        self.status = StatusIndex.from_settings(services.storage)

    def put(self, *names: str) -> None:
        for name in names:
            self.s3.put_object(Bucket=self.bucket, Key=f"in/{name}", Body=b"x")

    def schedule(self, **more: Any) -> Schedule:
        said: dict[str, Any] = {
            "name": "letters", "cron": "30 1 * * *", "source": f"s3://{self.bucket}/in/", "task_type": "ner",
            "callback": HOOK,
        }  # fmt: skip
        return Schedule.model_validate(said | more)

    def start(self, schedule: Schedule, moment: datetime) -> str:
        self.services.confirm(start_message(schedule, moment))
        return run_id_of(schedule.name, moment)

    def work(
        self, count: int, *, queue: str = "inference.ner.low", fail: str = "", pages: int = 2
    ) -> list[str]:
        """End so many tasks; those with `fail` in their input fail. Gives their ids."""
        ended: list[str] = []
        while len(ended) < count:
            body = self._get(queue)
            task = parse_task(body)
            now = datetime.now(UTC)
            source = str(task.metadata.get("source"))
            if fail and fail in source:
                kept = Result.failure(
                    task, InvalidTask("not text", code="not_text"), attempts=1, finished_at=now
                )
            else:
                kept = Result(
                    task_id=task.task_id, task_type=task.task_type, tenant=task.tenant, status="succeeded",
                    output={"pages": [{}] * pages, "of": source}, attempts=1, batch_id=task.batch_id,
                    batch_line=task.batch_line, metadata=task.metadata, finished_at=now, digest=task.digest(),
                )  # fmt: skip
            self.status.ended(self.services.results.save(kept))
            ended.append(task.task_id)
        return ended

    def _get(self, queue: str, seconds: float = 20) -> bytes:
        body: list[bytes] = []

        def come() -> bool:
            method, _, content = self.channel.basic_get(queue, auto_ack=True)
            if method is not None and content is not None:
                body.append(content)
            return bool(body)

        eventually(come, seconds)
        return body[0]

    def depth(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def callback(self) -> tuple[str, dict[str, Any]]:
        """The id and the content of the next callback that was handed over."""
        _, arguments, _ = json.loads(self._get("inference.callbacks"))
        return arguments["callback"]["callback_id"], json.loads(arguments["callback"]["body"])

    def summary(self, run_id: str) -> BatchSummary:
        found: list[BatchSummary] = []

        def ended() -> bool:
            summary = self.services.batches.summary("default", run_id)
            found.extend([summary] if summary else [])
            return bool(found)

        eventually(ended)
        return found[0]

    def lines(self, key: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.services.store.get(key).splitlines()]

    @contextmanager
    def working(self) -> Iterator[None]:
        """The jobs are worked on, as by `inferq callbacks --queues batches`."""
        app = celery_app(self.services.broker)
        batch_jobs.add_jobs(app, self.services)
        jobs.add_jobs(app, self.services, watch_seconds=1)
        with working(app, queues=["inference.batches"]):
            yield

    def close(self) -> None:
        self.services.close()
        self.status.close()
        try:
            self.connection.close()
        except pika.exceptions.AMQPError:
            return


@pytest.fixture(scope="module")
def nights_amqp_url(shared_rabbitmq: RabbitMQ) -> Iterator[str]:
    """A virtual host for all tests of this file: the queues of delays take seconds to declare."""
    with shared_rabbitmq.vhost("nights") as url:
        yield url


@pytest.fixture
def site(
    nights_amqp_url: str, redis_url: str, tmp_path: Path, s3_url: str, s3: S3Client, bucket: str
) -> Iterator[Site]:
    address = urlsplit(redis_url)._replace(path=f"/{next(_databases)}").geturl()
    services = BatchServices(
        BatchSettings(batch_slice=5, batch_doubt=0.5),
        StorageSettings(
            redis_url=address,
            store_url=(tmp_path / "store").as_uri(),
            store_fsync=False,
            s3_endpoint_url=s3_url,
            fetch_s3_buckets=(bucket,),
        ),
        BrokerSettings(amqp_url=nights_amqp_url),
    )
    site = Site(services, s3, bucket)
    for queue in ("inference.ner.low", "inference.callbacks", "inference.batches"):
        site.channel.queue_purge(queue)
    yield site
    site.close()
    with redis.Redis.from_url(address) as connection:
        connection.flushdb()


def test_a_run_goes_from_its_start_to_its_summary_and_the_next_takes_what_is_new(site: Site) -> None:
    site.put("a", "b", "bad")
    night = datetime(2026, 11, 24, 1, 30, tzinfo=UTC)
    first = site.start(site.schedule(), night)
    site.start(site.schedule(), night)  # a second beat
    with site.working():
        site.work(3, fail="bad")
        summary = site.summary(first)
        assert (summary.state, summary.counts.succeeded, summary.counts.failed) == ("completed", 2, 1)
        assert [line["output"]["of"][-1] for line in site.lines(output_key("default", first))] == ["a", "b"]
        told, body = site.callback()
        assert body["type"] == "nightly.summary"
        data = body["data"]
        assert (data["run_id"], data["night"], data["state"]) == (first, "2026-11-24", "completed")
        assert (data["succeeded"], data["failed"], data["failures"]) == (2, 1, {"not_text": 1})
        assert (data["pages"], data["total"]) == (4, 3)
        assert data["pages_per_second"] > 0
        # Both starts are watched over, and tell the same.
        assert site.callback() == (told, body)
        assert site.depth("inference.ner.low") == 0

        site.put("c")
        second = site.start(site.schedule(), night + timedelta(days=1))
        site.work(1)
        assert site.summary(second).counts.succeeded == 1
        assert [line["output"]["of"][-1] for line in site.lines(output_key("default", second))] == ["c"]
        assert site.callback()[0] != told

        third = site.start(site.schedule(), night + timedelta(days=2))
        nothing = site.summary(third)
        assert (nothing.state, nothing.counts.total) == ("completed", 0)
        assert site.lines(output_key("default", third)) == []
        assert site.callback()[1]["data"]["total"] == 0


def test_a_later_start_is_told_of_as_the_run_was_first_started_and_an_ended_run_no_more(site: Site) -> None:
    site.put("a")
    moment = datetime(2026, 11, 24, 1, 30, tzinfo=UTC)
    run_id = site.start(site.schedule(), moment)
    with site.working():
        eventually(lambda: site.services.batches.load("default", run_id))
        # The schedule was changed meanwhile; by its zone the same time is another day.
        site.start(site.schedule(time_zone="America/New_York"), moment)
        eventually(lambda: site.depth("inference.batches") == 0)
        time.sleep(1)  # it is being worked on
        site.work(1)
        first = site.callback()
        assert first[1]["data"]["night"] == "2026-11-24"
        assert site.callback() == first
        site.start(site.schedule(), moment)
        # A watch looks within a second.
        consistently(lambda: site.depth("inference.callbacks") == 0, seconds=4)
    nights = RunLog(site.services.store, "default", "letters").nights(run_id, Night)
    assert [night.night for night in nights] == ["2026-11-24"]


def test_a_run_whose_source_cannot_be_read_fails_with_words_and_is_told(site: Site) -> None:
    storage = site.services.storage.model_copy(update={"fetch_s3_buckets": ("nowhere-2",)})
    site.services = replace(site.services, storage=storage)
    with site.working():
        for bucket, words in (("nowhere-1", "INFERQ_FETCH_S3_BUCKETS"), ("nowhere-2", "does not exist")):
            schedule = site.schedule(name=bucket, source=f"s3://{bucket}/in/")
            run_id = site.start(schedule, datetime(2026, 11, 24, 1, 30, tzinfo=UTC))
            summary = site.summary(run_id)
            assert summary.state == "failed"
            assert words in (summary.error or "")
            data = site.callback()[1]["data"]
            assert (data["run_id"], data["state"], data["error"]) == (run_id, "failed", summary.error)
            assert site.lines(errors_key("default", run_id)) == []


def test_a_run_whose_id_is_anothers_fails_with_words_and_is_told_and_logged_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.put("a")
    moment = datetime(2026, 11, 24, 1, 30, tzinfo=UTC)
    run_id = run_id_of("letters", moment)
    theirs = Batch(batch_id=run_id, source="s3://theirs/in.jsonl", created_at=datetime.now(UTC))
    site.services.batches.create(theirs)
    with site.working():
        site.start(site.schedule(), moment)
        told, body = site.callback()
        site.start(site.schedule(), moment)  # a second beat
        assert site.callback() == (told, body)
        data = body["data"]
        assert (data["run_id"], data["night"], data["state"]) == (run_id, "2026-11-24", "failed")
        assert f"batch '{run_id}' was submitted by another client" in data["error"]
        second = site.start(site.schedule(), moment + timedelta(days=1))
        site.work(1)
        assert site.summary(second).counts.succeeded == 1
        eventually(lambda: site.depth("inference.batches") == 0)
    assert len([r for r in caplog.records if r.levelname == "ERROR" and run_id in r.getMessage()]) == 1
    assert site.services.batches.load("default", run_id) == theirs
    assert site.services.batches.summary("default", run_id) is None


def test_a_run_stops_at_the_end_of_its_window_and_goes_on_when_that_opens(site: Site) -> None:
    site.put(*(f"page-{number}" for number in range(6)))
    at_night = datetime(2026, 11, 24, 2, tzinfo=UTC)
    moments = [at_night]
    site.services = replace(site.services, clock=lambda: moments[-1])
    schedule = site.schedule(window="01:00-05:00", max_in_flight=2)
    run_id = site.start(schedule, datetime(2026, 11, 24, 1, 30, tzinfo=UTC))

    def state() -> str | None:
        standing = site.services.index.look("default", run_id)
        return standing.state if standing else None

    with site.working():
        site.work(1)
        eventually(lambda: site.depth("inference.ner.low") == 2)
        moments.append(datetime(2026, 11, 25, 0, 59, 58, tzinfo=UTC))
        site.work(2)
        eventually(lambda: state() == "paused")
        assert site.depth("inference.ner.low") == 0
        assert site.services.batches.summary("default", run_id) is None
        moments.append(at_night)
        site.work(3)
        assert site.summary(run_id).counts.succeeded == 6
    assert len({line["output"]["of"] for line in site.lines(output_key("default", run_id))}) == 6


def test_each_night_of_a_run_is_told_once_and_the_nights_add_up(site: Site) -> None:
    """By a clock of the test's own: what is stored now belongs to the first night."""
    today = datetime.now(UTC)
    closes = today + timedelta(minutes=5)
    schedule = site.schedule(window=f"{closes - timedelta(hours=4):%H:%M}-{closes:%H:%M}")
    closes = closes.replace(second=0, microsecond=0)
    run = Run(run_id=run_id_of("letters", today), scheduled_at=today, schedule=schedule)
    site.put("a", "bad", "c")
    services = site.services
    Starter(services.store, services.batches, services.sources, lambda _message: None).start(schedule, today)
    batch = services.batches.load("default", run.run_id)
    assert batch is not None
    for line, status in ((1, "succeeded"), (2, "failed")):
        services.results.save(_ended(batch.task_id(line), status, today))
    watcher = Watcher(services, run)

    assert watcher.look(batch.created_at, closes - timedelta(minutes=1)) == batch.created_at
    # By a clock that was ahead, this night and the next had been reported.
    early = closes - timedelta(minutes=1)
    assert watcher.look(closes + timedelta(days=1), early) == early
    assert (
        watcher.look(batch.created_at, closes) == batch.created_at
    )  # what was stored last is not listed yet
    assert site.depth("inference.callbacks") == 0
    later = closes + timedelta(seconds=10)
    assert watcher.look(batch.created_at, later) == closes
    first = site.callback()
    assert first[1]["data"]["state"] == "paused"
    assert (first[1]["data"]["succeeded"], first[1]["data"]["failures"]) == (1, {"not_text": 1})
    assert first[1]["data"]["total"] == 3

    assert watcher.look(batch.created_at, later) == closes  # killed before it went on, and repeated
    assert site.callback() == first
    assert watcher.look(closes, closes + timedelta(days=1, minutes=1)) == closes + timedelta(days=1)
    second = site.callback()
    assert second[0] != first[0]
    assert (second[1]["data"]["succeeded"], second[1]["data"]["failures"]) == (0, {})

    ended = closes + timedelta(days=1, hours=22)
    services.batches.finish(
        BatchSummary.model_validate(
            {
                "batch_id": run.run_id, "tenant": "default", "state": "completed",
                "counts": {"total": 3, "succeeded": 2, "failed": 1}, "failures": {"not_text": 1},
                "seconds": 1.0, "tasks_per_second": 1.0, "pages": 4,
                "created_at": today, "finished_at": ended,
            }
        )
    )  # fmt: skip
    assert watcher.look(closes + timedelta(days=1), ended) is None
    last = site.callback()
    assert last[0] not in {first[0], second[0]}
    assert (last[1]["data"]["succeeded"], last[1]["data"]["failed"], last[1]["data"]["failures"]) == (
        1,
        0,
        {},
    )
    assert last[1]["data"]["pages"] == 2
    nights = RunLog(services.store, "default", "letters").nights(run.run_id, Night)
    assert [night.state for night in nights] == ["paused", "paused", "completed"]


def _ended(task_id: str, status: str, now: datetime) -> Result:
    batch_id, _, line = task_id.rpartition(".")
    error = {"code": "not_text", "message": "", "retryable": False} if status == "failed" else None
    return Result.model_validate(
        {
            "task_id": task_id, "batch_id": batch_id, "batch_line": int(line), "task_type": "ner",
            "tenant": "default", "status": status, "attempts": 1, "finished_at": now, "error": error,
            "output": {"pages": [{}, {}]} if error is None else None,
        }
    )  # fmt: skip
