"""Refuses what cannot be handled as a task: messages that are none, and deliveries that fail unexpectedly."""

from __future__ import annotations

import logging
from datetime import datetime
from functools import partial

from inferq.consumers.runtime.process import RunAborted
from inferq.consumers.worker.endings import Endings
from inferq.consumers.worker.notifier import legible_url
from inferq.consumers.worker.records import Records
from inferq.consumers.worker.services import GracePassed, WorkerServices
from inferq.schemas import InferqError, Result, TransientFailure, parse_task, report_incident
from inferq.storage import UnreadableResult

WORKER_ERROR = "worker_error"
"""The code of a task that failed by a fault of the worker itself."""

_log = logging.getLogger(__name__)


def refuse_unreadable(
    services: WorkerServices, records: Records, endings: Endings, error: InferqError, *, started_at: datetime
) -> None:
    """Dead-letter a message that is no task. If it names a task id, that task gets a failure and a callback."""
    _log.warning("%s: refused: %s", records.name, error.code)  # the message may quote the task
    endings.dead_letter(records.dead_letter(error))
    failure = records.unreadable(error, started_at=started_at)
    if failure is not None and _may_end(services, endings, failure):
        endings.use_callback_url(legible_url(records.delivery.body))
        endings.record(failure)


def _may_end(services: WorkerServices, endings: Endings, failure: Result) -> bool:
    """Whether an unreadable message may have a record: the id of another, readable task is left to that task."""
    try:
        kept = endings.load(failure.tenant, failure.task_id)
    except UnreadableResult:
        return False
    if kept is not None:
        return kept.digest is None  # the record of this message, delivered again
    return services.best_effort(partial(services.status.get, failure.tenant, failure.task_id)) is None


def refuse_after_fault(records: Records, endings: Endings, fault: Exception, *, started_at: datetime) -> bool:
    """The last resort for a delivery that even failing failed: a dead letter and, if possible, a record.

    False if it could not be dead-lettered either, or the worker has to stop: then it is to be requeued. After
    the delivery limit RabbitMQ dead-letters it.
    """
    failure = worker_fault(records, fault)
    try:
        endings.dead_letter(records.dead_letter(failure))
    except (GracePassed, RunAborted):
        return False
    except Exception:
        _log.exception("%s: cannot be dead-lettered", records.name)
        return False
    try:
        # Without a record its batch, and everybody who asks for the task, would wait for ever.
        task = parse_task(records.delivery.body)
        endings.record(records.failure(task, failure, digest=records.digest(task), started_at=started_at))
    except (GracePassed, RunAborted):
        return False
    except Exception:
        _log.exception("%s: dead-lettered, but its end cannot be recorded", records.name)
    return True


def worker_fault(records: Records, fault: Exception) -> TransientFailure:
    """The failure of a task for a fault of the worker itself, which is logged."""
    incident = report_incident(_log, f"{records.name}: the worker failed", fault)
    return TransientFailure(f"the worker failed: {incident}", code=WORKER_ERROR)
