"""Retries of batch and nightly jobs.

A job publishes its successor (confirmed) and is then acknowledged. If it fails, it publishes itself again with a
delay: a batch waits out any outage and is never dropped. It waits in the broker: waiting on a thread, a few broken
batches would block all others.

Celery's own `Task.retry` would not do: if it cannot publish, it rejects the job without requeueing it
(tests/jobs/test_retry.py).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from celery import Task
from celery.exceptions import Reject

from inferq.broker import Message, delayed, job_message
from inferq.consumers.batches.services import BatchServices
from inferq.schemas import InferqError, Outage
from inferq.storage.batches.store import RecordMissing

OUTAGE_SECONDS = 30.0
"""The longest pause during an outage, in seconds: work resumes soon after it ends."""
FAULT_SECONDS = 600.0
"""The longest pause after any other error, in seconds: most need a person to fix them."""

SOURCE_DOUBTS = 8
"""How often a batch looks again for a source that is missing or refused, before it fails: about 12 minutes, as long
as a task is retried. An object store that is being replaced, or a proxy in front of it, gives such answers."""
_RECORD_DOUBTS = 150
"""How often a job looks again for the record of its batch, before it is dropped: about a day."""

_log = logging.getLogger(__name__)


def resend_unless_done(task: Task, services: BatchServices, what: str, call: Callable[[], object]) -> None:
    """Call `call`; if it fails, publish the job again with a delay. `what` names it in the log."""
    failures = task.request.retries
    try:
        call()
        return
    except Outage as error:
        pause = retry_pause(failures, services.pauses.resend, OUTAGE_SECONDS)
        _log.warning("%s: a service is unavailable, retrying in %.0f s: %s", what, pause, error)
    except RecordMissing as error:
        if failures >= _RECORD_DOUBTS:
            _log.error("%s: given up: %s", what, error)
            return
        pause = retry_pause(failures, services.pauses.resend, FAULT_SECONDS)
        _log.error("%s: retrying in %.0f s: %s", what, pause, error)
    except InferqError as error:
        pause = retry_pause(failures, services.pauses.resend, FAULT_SECONDS)
        _log.error("%s: failed, retrying in %.0f s: %s", what, pause, error)
    except Exception as error:
        pause = retry_pause(failures, services.pauses.resend, FAULT_SECONDS)
        # Only the first failure logs its stack.
        _log.error("%s: failed, retrying in %.0f s: %r", what, pause, error, exc_info=failures == 0)
    try:
        services.confirm(delayed(_resent(task), pause))
    except Exception as error:
        _log.warning("%s: the retry cannot be published, requeued: %s", what, error)
        services.stopping.wait(services.pauses.resend)
        raise Reject(f"{what} failed and is requeued", requeue=True) from error


def retry_pause(failures: int, first: float, most: float) -> float:
    """The pause in seconds after `failures` earlier failures, with jitter; `first` is the first one's."""
    return min(most, first * 2.0 ** min(failures, 10)) * random.uniform(0.8, 1.0)  # noqa: S311


def _resent(task: Task) -> Message:
    request = task.request
    return job_message(
        task.name, "inference.batches", request.kwargs, job_id=request.id, retries=request.retries + 1
    )
