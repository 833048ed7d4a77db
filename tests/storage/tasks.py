"""Tasks and their ends, as the tests of the status index record them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from inferq.schemas import (
    ErrorInfo,
    Result,
    Task,
    TaskStatus,
)
from inferq.storage import StatusIndex
from tests.runs import begin_run

NOW = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)
ERROR = ErrorInfo(code="boom", message="it broke", retryable=True)
Race = Callable[[int, Callable[[int], object]], list[object]]


class Job(Task):
    task_type: Literal["job"] = "job"
    text: str = "x"


def job(task_id: str = "t1", **more: Any) -> Job:
    return Job(task_id=task_id, **more)


def end(
    task: Task, status: str = "succeeded", *, attempts: int = 1, redrives: int = 0, **more: Any
) -> Result:
    return Result(
        **{
            "task_id": task.task_id, "task_type": task.task_type, "tenant": task.tenant,
            "status": status, "attempts": attempts, "redrives": redrives, "finished_at": datetime.now(UTC),
            "digest": task.digest(), "batch_id": task.batch_id,
            "error": None if status == "succeeded" else ERROR, **more,
        }
    )  # fmt: skip


def begin(
    index: StatusIndex,
    task: Task,
    attempt: int = 1,
    redrives: int = 0,
    worker: str = "w1",
    run: str | None = None,
    silence: float = 0.0,
) -> Any:
    return begin_run(index, task, attempt=attempt, redrives=redrives, worker=worker, run=run, silence=silence)


def known(index: StatusIndex, task: Task) -> TaskStatus:
    status = index.get(task.tenant, task.task_id)
    assert status
    return status
