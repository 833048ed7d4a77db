"""A task's input files: fetched into its scratch folder before the engine needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inferq.consumers.runtime.messages import FileRef
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import Task


@dataclass(frozen=True)
class Inputs:
    """The files by the name of their field, and how many seconds fetching them took."""

    files: dict[str, FileRef]
    seconds: float


def fetch_inputs(
    services: WorkerServices, task: Task, folder: Path, checkpoint: Callable[[], None]
) -> Inputs:
    """Fetch the task's input URLs into `folder`, which is created if there are any.

    Raises InvalidTask or TransientFailure if one cannot be fetched, and what `checkpoint` raises while it waits.
    """
    began = time.monotonic()
    # Otherwise a worker with a full disk would spend the attempts of task after task; also of those without inputs,
    # since engines write their artifacts there.
    services.retry_until_available("scratch folder", services.scratch.check, checkpoint)
    files = {}
    for name, url in task.inputs().items():
        folder.mkdir(parents=True, exist_ok=True)
        # If our own store is unavailable, the fetch waits; if another server fails, the attempt fails.
        fetch = partial(services.fetcher.fetch, url, folder, name, tenant=task.tenant, checkpoint=checkpoint)
        fetched = services.retry_until_available("object store", fetch, checkpoint)
        files[name] = FileRef(
            path=fetched.path,
            content_type=fetched.content_type,
            bytes=fetched.bytes,
            sha256=fetched.sha256,
        )
    return Inputs(files, time.monotonic() - began)
