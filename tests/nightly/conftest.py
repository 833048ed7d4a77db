"""Nightly runs with a real store, S3 over HTTP for the source, and what would be published kept in a list."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from inferq.broker import Message
from inferq.consumers.nightly.start import Starter
from inferq.schemas import Batch
from inferq.schemas.schedule import Schedule
from inferq.storage import BatchStore, LocalStore, ObjectStore, StorageSettings
from inferq.storage.batches.lines import read_lines
from inferq.storage.batches.sources import Sources
from inferq.storage.nightly_runs import RunLog

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

FIRST = datetime(2026, 11, 24, 0, 30, tzinfo=UTC)
SECOND = datetime(2026, 11, 25, 0, 30, tzinfo=UTC)
THIRD = datetime(2026, 11, 26, 0, 30, tzinfo=UTC)


class NightSite:
    """Where runs are started; `sent` is what was handed to the broker."""

    def __init__(self, store: ObjectStore, settings: StorageSettings, s3: S3Client, bucket: str) -> None:
        self.store = store
        self.settings = settings
        self.s3 = s3
        self.bucket = bucket
        self.batches = BatchStore(store)
        self.sent: list[Message] = []
        self.starter = Starter(store, self.batches, Sources(store, self.batches, settings), self.sent.append)

    def schedule(self, **more: Any) -> Schedule:
        said: dict[str, Any] = {
            "name": "invoices",
            "cron": "30 1 * * *",
            "time_zone": "Europe/Berlin",
            "source": f"s3://{self.bucket}/in/",
            "task_type": "ocr",
        }
        return Schedule.model_validate(said | more)

    def log(self, name: str = "invoices") -> RunLog:
        return RunLog(self.store, "default", name)

    def put(self, *names: str, content: str = "x") -> None:
        for name in names:
            self.s3.put_object(Bucket=self.bucket, Key=f"in/{name}", Body=content.encode())

    def delete(self, name: str) -> None:
        self.s3.delete_object(Bucket=self.bucket, Key=f"in/{name}")

    def start(self, moment: datetime, **more: Any) -> list[str]:
        """Start a run; gives the names of the objects that it takes."""
        batch = self.starter.start(self.schedule(**more), moment).batch
        assert batch is not None
        return self.names(batch)

    def squat(self, run_id: str) -> Batch:
        """Somebody's batch that has the id of a run."""
        source = f"s3://{self.bucket}/theirs.jsonl"
        return self.batches.create(Batch(batch_id=run_id, source=source, created_at=datetime.now(UTC)))

    def names(self, batch: Batch) -> list[str]:
        """The names of the objects in the JSONL that a batch is fed from."""
        source = self.batches.source(batch.tenant, batch.batch_id)
        if source is None:
            return []
        lines = [json.loads(line.content or b"") for line in read_lines(self.store.stream(source.key))]
        assert len(lines) == source.lines
        return [str(line["image_url"]).rpartition("/")[2] for line in lines]

    def jobs(self) -> list[str]:
        """The names of the jobs that were sent."""
        return [str(message.headers["task"]) for message in self.sent]


@pytest.fixture
def site(tmp_path: Path, s3_url: str, s3: S3Client, bucket: str) -> NightSite:
    settings = StorageSettings(
        store_url=tmp_path.as_uri(), s3_endpoint_url=s3_url, fetch_s3_buckets=(bucket,)
    )
    return NightSite(LocalStore(tmp_path, fsync=False), settings, s3, bucket)


class CutOff(Exception):
    """The process is gone."""


class CutStore:
    """A store before which the process ends once so many writes are done."""

    def __init__(self, store: ObjectStore, writes: int) -> None:
        self._store = store
        self._left = writes
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in {"put", "create", "delete"}:
            return method

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if self._left == 0:
                    raise CutOff
                self._left -= 1
            return method(*args, **kwargs)

        return counted
