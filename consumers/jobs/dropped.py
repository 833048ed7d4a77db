"""Ends the tasks whose messages RabbitMQ itself dead-letters, since no worker does.

A message expires by its AMQP `expiration` or by a policy, is rejected by a foreign consumer, exceeds the delivery
limit, or falls out of a full queue. RabbitMQ then puts it into the dead-letter queue of its type, as workers do with
failed tasks, and a copy into `inference.dropped`.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from structlog.contextvars import bound_contextvars

from inferq.broker import (
    DROPPED,
    Consumer,
    Delivery,
    backoff,
    dropped_message,
    job_topology,
    named_id,
)
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.probes.registry import ENDS
from inferq.consumers.worker.decision import LEASE_SECONDS
from inferq.consumers.worker.notifier import Notifier, legible_url
from inferq.consumers.worker.records import Records
from inferq.schemas import InferqError, InvalidTask, Outage, Result, Task, TransientFailure, parse_task
from inferq.schemas.trace_context import TraceContext, trace_context
from inferq.storage import StatusOutage, UnreadableResult

_LOOK_SECONDS = 0.5

_log = logging.getLogger(__name__)


def drop_error(delivery: Delivery) -> InferqError | None:
    """Why RabbitMQ dead-lettered a message; None for the dead letter of a worker, which has recorded the end."""
    deaths = delivery.headers.get("x-death")
    if not isinstance(deaths, list) or not deaths or not isinstance(deaths[0], dict):
        return None
    reason, queue = str(deaths[0].get("reason")), deaths[0].get("queue")
    match reason:
        case "expired":
            return InvalidTask(
                f"the message expired in queue {queue!r} before a worker took it: by its AMQP `expiration`, or by "
                "a message TTL of the queue",
                code="expired",
            )
        case "delivery_limit":
            return InvalidTask(
                f"queue {queue!r} delivered the message up to its delivery limit, and no run ended: it most "
                "likely ends its worker",
                code="poison",
            )
    return TransientFailure(f"RabbitMQ removed the message from queue {queue!r}: {reason}", code="dropped")


class DroppedTasks(threading.Thread):
    """Consumes the copies of dead letters until `stop`."""

    def __init__(self, services: BatchServices) -> None:
        super().__init__(name="dropped", daemon=True)
        self._services = services
        self._stopping = threading.Event()
        self._consumer = Consumer(services.broker, [DROPPED], name="dropped", topology=job_topology())

    def run(self) -> None:
        self._consumer.start()
        failures = 0
        while not self._stopping.is_set():
            delivery = self._consumer.next(_LOOK_SECONDS)
            if delivery is None:
                continue
            try:
                with bound_contextvars(task_id=named_id(delivery)):
                    self.end(delivery)
            except Outage as error:
                failures += 1
                if failures == 1:
                    _log.warning("the end of a dropped task cannot be recorded; still retrying: %s", error)
                self._consumer.requeue(delivery)
                self._stopping.wait(backoff(failures))
                continue
            except Exception:
                # The dead letter itself stays in the queue of its type.
                _log.exception("a dropped message was dead-lettered, but its end cannot be recorded")
            failures = 0
            self._consumer.ack(delivery)
        self._consumer.close()

    def stop(self) -> None:
        """Stop consuming and close the services."""
        self._stopping.set()
        self.join(10)
        self._services.close()

    def end(self, delivery: Delivery) -> None:
        """Record the failure of a dropped task and report it to its owner. Raises Outage.

        While another copy of the task runs, that one decides how it ends: the dropped one waits in its queue.
        """
        error = drop_error(delivery)
        if error is None:
            return
        type_name = delivery.routing_key.removeprefix("task_type.").partition(".")[0]
        trace = trace_context(delivery.headers)
        records = Records(
            delivery, "normal", type_name=type_name, worker="RabbitMQ",
            trace_id=trace.trace_id if trace is not None else None,
        )  # fmt: skip
        now = datetime.now(UTC)
        try:
            task = parse_task(delivery.body)
        except InvalidTask:
            _log.warning("%s: %s", records.name, error)
            failure = records.unreadable(error, started_at=now)
            if failure is not None and self._is_free(failure):
                self._report(self._save(failure), legible_url(delivery.body), trace)
            return
        if self._runs(task):
            self._services.confirm(dropped_message(delivery))
            return
        _log.warning("%s: %s", records.name, error)
        digest = records.digest(task)
        kept = self._save(records.failure(task, error, digest=digest, started_at=now))
        # Another task's record under this id is not this task's to report.
        url = task.callback_url if kept.digest == digest and "completed" in task.callback_events else None
        self._report(kept, url, trace)

    def _runs(self, task: Task) -> bool:
        """Whether a run of the task gives a sign of life. Without Redis no run has a lease."""
        with suppress(StatusOutage):
            read = partial(self._services.status.lease, task.tenant, task.task_id)
            lease, end = read(), time.monotonic() + LEASE_SECONDS
            while lease and time.monotonic() < end:
                if self._stopping.wait(_LOOK_SECONDS):
                    return True
                if (now := read()) != lease:
                    return bool(now)
        return False

    def _save(self, failure: Result) -> Result:
        kept = self._services.results.save(failure)
        if kept is failure:
            ENDS.count(failure)
        return kept

    def _is_free(self, failure: Result) -> bool:
        """Whether no readable task has the id of an unreadable message."""
        try:
            kept = self._services.results.load(failure.tenant, failure.task_id)
        except UnreadableResult:
            return False
        if kept is not None:
            return kept.digest is None
        return self._services.status.get(failure.tenant, failure.task_id) is None

    def _report(self, kept: Result, url: str | None, trace: TraceContext | None) -> None:
        with suppress(StatusOutage):  # an index, which is repaired from the store
            self._services.status.ended(kept)
        Notifier(self._services.publisher, self._services.confirm, url=url, trace=trace).ended(kept)
