"""What one delivery leaves behind: a result or a failure, a retry, a dead letter. Makes them, sends nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from inferq.broker import (
    Delivery,
    Message,
    dead_message,
    deferred_message,
    named_id,
    retry_message,
    waiting_message,
)
from inferq.consumers.worker.decision import Defer, Retry, WaitForOtherRun, WaitForSameWork
from inferq.schemas import (
    Artifact,
    EngineInfo,
    ErrorInfo,
    InferqError,
    Priority,
    Result,
    Task,
    Timings,
)

_MAX_SKEW = timedelta(minutes=5)
"""How far a producer's clock may be ahead; a later creation time is an error."""
_LONGEST_WAIT = timedelta(days=30)
"""A creation time longer ago is an error, too."""


@dataclass(frozen=True)
class Records:
    """Makes the records and messages of one delivery, which came by `lane` to a worker of one task type."""

    delivery: Delivery
    lane: Priority
    type_name: str
    worker: str
    track: str | None = None
    trace_id: str | None = None

    @property
    def name(self) -> str:
        """The task and its queue, for a line in a log."""
        return f"task {named_id(self.delivery)!r} on {self.delivery.queue}"

    def digest(self, task: Task) -> str:
        """The digest that the task was accepted with; made here for a message without one."""
        return self.delivery.digest or task.digest()

    def seconds_queued(self, task: Task, started_at: datetime) -> float | None:
        """Seconds from the task's creation to its start; None if nothing says credibly when it was created.

        Producers set both times, perhaps from a wrong clock. One such wait would spoil every average.
        """
        for since in (task.created_at, self.delivery.timestamp):
            if since is not None and -_MAX_SKEW <= started_at - since <= _LONGEST_WAIT:
                return max(0.0, (started_at - since).total_seconds())
        return None

    def success(
        self,
        task: Task,
        *,
        digest: str,
        started_at: datetime,
        artifacts: tuple[Artifact, ...],
        timings: Timings,
        engine: EngineInfo | None,
        cached: bool,
        batch_size: int = 1,
    ) -> Result:
        """The result of a task that was computed, or answered from the cache; its output goes beside it."""
        return Result(
            task_id=task.task_id,
            task_type=task.task_type,
            tenant=task.tenant,
            status="succeeded",
            artifacts=artifacts,
            attempts=self.delivery.attempt,
            timings=timings,
            engine=engine,
            batch_id=task.batch_id,
            batch_line=task.batch_line,
            metadata=task.metadata,
            worker=self.worker,
            track=self.track,
            created_at=task.created_at,
            started_at=started_at,
            finished_at=datetime.now(UTC),
            digest=digest,
            cached=cached,
            batch_size=batch_size,
            redrives=self.delivery.redrives,
            trace_id=self.trace_id,
        )

    def failure(
        self,
        task: Task,
        error: InferqError,
        *,
        digest: str,
        started_at: datetime,
        engine: EngineInfo | None = None,
        timings: Timings | None = None,
    ) -> Result:
        """The record of a task that failed for good."""
        return Result.failure(
            task,
            error,
            attempts=self.delivery.attempt,
            finished_at=datetime.now(UTC),
            digest=digest,
            timings=timings,
            engine=engine,
            worker=self.worker,
            track=self.track,
            started_at=started_at,
            redrives=self.delivery.redrives,
            trace_id=self.trace_id,
        )

    def unreadable(self, error: InferqError, *, started_at: datetime) -> Result | None:
        """The failure of a message that is no task; None if the message does not name a task id legibly."""
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken = json.loads(self.delivery.body)
            return Result(
                **_batch_line_of(broken),
                task_id=broken["task_id"],
                task_type=self.type_name,
                tenant=broken.get("tenant", "default"),
                status="failed",
                attempts=self.delivery.attempt,
                error=ErrorInfo.of(error),
                worker=self.worker,
                track=self.track,
                started_at=started_at,
                finished_at=datetime.now(UTC),
                redrives=self.delivery.redrives,
                trace_id=self.trace_id,
            )
        return None

    def retry(self, task: Task, retry: Retry, *, digest: str) -> Message:
        """The next attempt, for its retry level."""
        return retry_message(
            self.delivery,
            task_id=task.task_id,
            type_name=task.task_type,
            priority=self.lane,
            seconds=retry.seconds,
            digest=digest,
            engine_deaths=retry.engine_deaths,
        )

    def deferral(self, defer: Defer) -> Message:
        """The same attempt once more, for its retry level."""
        return deferred_message(
            self.delivery, type_name=self.type_name, priority=self.lane, seconds=defer.seconds
        )

    def waiting(self, wait: WaitForOtherRun | WaitForSameWork, *, digest: str) -> Message:
        """The same attempt, for a retry level: another run of the task, or of the same work, is in progress."""
        return waiting_message(
            self.delivery, type_name=self.type_name, priority=self.lane, seconds=wait.seconds, digest=digest,
            waits=wait.waits if isinstance(wait, WaitForOtherRun) else 0,
        )  # fmt: skip

    def dead_letter(self, error: InferqError, *, digest: str | None = None) -> Message:
        """The delivery for the dead-letter queue, with the reason in its headers."""
        return dead_message(
            self.delivery,
            type_name=self.type_name,
            priority=self.lane,
            error=error,
            worker=self.worker,
            digest=digest,
        )


def _batch_line_of(broken: dict[str, Any]) -> dict[str, Any]:
    """The batch and line that an unreadable message belongs to, as fields; empty unless it says both."""
    with suppress(KeyError, ValueError):
        line = {name: broken[name] for name in ("batch_id", "batch_line")}
        Task.model_validate({"task_id": "any", "task_type": "any", **line})
        return line
    return {}
