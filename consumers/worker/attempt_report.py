"""What the log, the trace and the metrics say of one attempt."""

from __future__ import annotations

import logging
import time
from typing import Literal

from structlog.contextvars import bind_contextvars

from inferq.broker import Delivery
from inferq.consumers.runtime.process import EngineDied, OverTime
from inferq.consumers.worker.metrics import Stage
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import EngineInfo, InferqError, Task, tracing
from inferq.schemas.logs import fields

_log = logging.getLogger(__name__)

Outcome = Literal[
    "succeeded", "failed", "cancelled", "skipped", "retried", "given_back", "deferred", "duplicate", "waiting"
]
"""How a delivery ended, as the metric `inferq_worker_tasks_total` says it. `given_back` is a requeue; `deferred`
is a task that waits for a worker of another version; `duplicate` is a copy that waits while another run of its task is
in progress; `waiting` is a task that waits for another one's run, which computes the same."""


class AttemptReport:
    """Gathers what is known of an attempt on the way, and says it at its end.

    `stage` is the one that it is in, `timings` are the seconds of those behind it, and `error` is why it failed.
    """

    def __init__(self, services: WorkerServices, delivery: Delivery) -> None:
        self._services = services
        self._delivery = delivery
        self._began = time.monotonic()
        self.stage: Stage = "parse"
        self.timings: dict[str, float | None] = {}
        self.error: InferqError | None = None

    def begin(self, task: Task) -> None:
        """The message is read: say in the log and in the span which task it is."""
        bind_contextvars(tenant=task.tenant)
        if task.batch_id is not None:
            bind_contextvars(batch_id=task.batch_id)
        span = tracing.current()
        if span.recording:
            span.set("inferq.task.type", task.task_type)
            span.set("inferq.tenant", task.tenant)
            span.set("inferq.batch.id", task.batch_id)

    def count_failure(self, code: str) -> None:
        self._services.metrics.failed(self._services.task_type.name, self.stage, code)

    def end(self, outcome: Outcome, *, why: str | None, engine: EngineInfo | None, cached: bool) -> None:
        """Count the outcome, and log the attempt in one line. `why` it is given back."""
        services, error = self._services, self.error
        services.metrics.settled(services.task_type.name, outcome)
        if services.settings.track:
            services.track_figures.count(outcome, self.timings.get("inference"), cached=cached)
        seconds = {name: round(value, 4) for name, value in self.timings.items() if value is not None}
        more = fields(
            outcome=outcome,
            error_code=error.code if error is not None else None,
            stage=self.stage if error is not None else None,
            reason=why,
            queued_seconds=seconds.get("queued"),
            fetch_seconds=seconds.get("fetch"),
            inference_seconds=seconds.get("inference"),
            upload_seconds=seconds.get("upload"),
            seconds=round(time.monotonic() - self._began, 4),
            cached=True if cached else None,
            engine=f"{engine.name} {engine.version}" if engine is not None else None,
            worker=services.settings.worker_name,
            track=services.settings.track or None,
            queue=self._delivery.queue,
        )
        _log.info("attempt %s", outcome, extra=more)


def loggable(error: InferqError) -> str:
    """An error as the log may have it: most messages quote the task, with its texts, URLs and names of files."""
    return str(error) if isinstance(error, EngineDied | OverTime) else error.code
