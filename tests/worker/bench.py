"""A worker's services without its process: what it publishes goes to the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.consumers.worker.scratch import ScratchFolder
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.settings import WorkerSettings
from inferq.schemas import get_type
from inferq.storage import Fetcher, LocalStore, ResultStore, StatusIndex, StorageSettings


def services_at(storage: StorageSettings, folder: Path, publisher: object) -> WorkerServices:
    """The services of a worker of type echo, which keeps everything in the folder."""
    store = LocalStore(folder / "store", fsync=False)
    return WorkerServices(
        settings=WorkerSettings(redis_patience=0), task_type=get_type("echo"), store=store,
        results=ResultStore(store), fetcher=Fetcher(store, storage),
        status=StatusIndex.from_settings(storage), publisher=cast(Any, publisher), metrics=WorkerMetrics(),
        scratch=ScratchFolder(folder / "scratch"),
    )  # fmt: skip
