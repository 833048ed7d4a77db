"""A task's input files: fetched into its scratch folder before the engine needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inferq.consumers.runtime.messages import FileRef
from inferq.consumers.runtime.process import LOOK_SECONDS, AbortReason, RunAborted
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import Task


@dataclass(frozen=True)
class Inputs:
    """The files by the name of their field, and how many seconds fetching them took."""

    files: dict[str, FileRef]
    seconds: float


def fetch_inputs(
    services: WorkerServices, task: Task, folder: Path, abort_reason: Callable[[], AbortReason | None]
) -> Inputs:
    """Fetch what the task's input URLs name into `folder`, which is made where there are any.

    Raises InvalidTask and TransientFailure where one cannot be had, RunAborted where the run should stop.
    """
    began = time.monotonic()
    next_look = began + LOOK_SECONDS

    def checkpoint() -> None:
        nonlocal next_look
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + LOOK_SECONDS
            reason = abort_reason()
            if reason is not None:
                raise RunAborted(reason)

    files = {}
    for name, url in task.inputs().items():
        # A worker with a full disk would burn the attempts of task after task.
        services.retry_until_available("scratch folder", services.scratch.check_room, checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        # An outage of our own store delays the fetch; another's failure is the task's.
        fetch = partial(services.fetcher.fetch, url, folder, name, tenant=task.tenant, checkpoint=checkpoint)
        fetched = services.retry_until_available("object store", fetch, checkpoint)
        files[name] = FileRef(
            path=fetched.path,
            content_type=fetched.content_type,
            bytes=fetched.bytes,
            sha256=fetched.sha256,
        )
    return Inputs(files, time.monotonic() - began)
