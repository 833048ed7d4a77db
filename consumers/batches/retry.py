"""What all jobs share: their surroundings, and how one that cannot go on is done again.

A job sends what comes next first (confirmed), and is acknowledged then. Whatever goes wrong, that is the job
itself, after a while: a batch waits for what is away, however long, and is never dropped. It waits in the
broker: on a thread, a few broken batches would hold up all others.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from celery import Task
from celery.exceptions import Reject
from celery.signals import worker_shutting_down

from inferq.broker import Message, delayed, job_message
from inferq.consumers.batches.services import BatchServices
from inferq.schemas import InferqError, Outage

_AGAIN_SECONDS = 3.0
"""Seconds until a job is done again that failed for the first time; each further time it is twice as long."""
_OUTAGE_SECONDS = 30.0
"""Seconds at most where something is away: all goes on soon after it is back."""
_FAULT_SECONDS = 600.0
"""Seconds at most for any other fault, which mostly lasts until a person sees to it."""

_log = logging.getLogger(__name__)


def load_services() -> BatchServices:
    """Those that the environment names; their waits end as the process is to end. Raises InstallationError.

    They are loaded before a job comes: with a setting that cannot be read, none could be done.
    """
    here = BatchServices.load()
    here.index, here.store  # noqa: B018 - a URL that cannot be read is to be named now
    worker_shutting_down.connect(lambda **_: here.stopping.set(), weak=False)
    return here


def resend_unless_done(task: Task, here: BatchServices, what: str, call: Callable[[], object]) -> None:
    """Do it; where it fails, the job is sent again, to arrive after a while. `what` is for the log."""
    failures = task.request.retries
    try:
        call()
        return
    except Outage as error:
        pause = _pause(failures, _OUTAGE_SECONDS)
        _log.warning("%s: waits, and goes on then: %s", what, error)
    except InferqError as error:
        pause = _pause(failures, _FAULT_SECONDS)
        _log.error("%s: cannot go on, and tries again in %.0f s: %s", what, pause, error)
    except Exception as error:
        pause = _pause(failures, _FAULT_SECONDS)
        # The same stack again, hour after hour, would bury the rest.
        _log.error(
            "%s: cannot go on, and tries again in %.0f s: %r", what, pause, error, exc_info=failures == 0
        )
    try:
        here.confirm(delayed(_resent(task), pause))
    except Exception as error:
        # Nobody could go on now: the broker hands it out again.
        _log.warning("%s: cannot be sent again, and is given back: %s", what, error)
        here.stopping.wait(_AGAIN_SECONDS)
        raise Reject(f"{what} is to go on", requeue=True) from error


def _pause(failures: int, most: float) -> float:
    """Seconds to wait after so many failures before this one, with some jitter."""
    return min(most, _AGAIN_SECONDS * 2.0 ** min(failures, 10)) * random.uniform(0.8, 1.0)  # noqa: S311


def _resent(task: Task) -> Message:
    request = task.request
    return job_message(
        task.name, "inference.batches", request.kwargs, job_id=request.id, retries=request.retries + 1
    )
