"""Runs on record, as a worker begins them."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

from inferq.schemas import Task
from inferq.storage import Begun, StatusIndex


def begin_run(
    status: StatusIndex,
    task: Task,
    *,
    attempt: int = 1,
    redrives: int = 0,
    worker: str = "w1",
    started_at: datetime | None = None,
    run: str | None = None,
    silence: float = 0.0,
    repeats: bool = True,
    trace_id: str | None = None,
    work: str | None = None,
    work_silence: float = 10.0,
) -> Begun:
    """Record that a run of the task begins."""
    return status.begin_pipelined(
        task,
        attempt=attempt,
        redrives=redrives,
        worker=worker,
        started_at=started_at or datetime.now(UTC),
        digest=task.digest(),
        run=run or secrets.token_hex(6),
        silence=silence,
        repeats=repeats,
        trace_id=trace_id,
        work=work,
        work_silence=work_silence,
    )()
