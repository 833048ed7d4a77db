"""What all jobs share: their surroundings, and how one that cannot go on is done again.

A job sends what comes next first (confirmed), and is acknowledged then. Whatever goes wrong, its message is
given back after a while: a batch waits for what is away, however long, and is never dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from celery.exceptions import Reject
from celery.signals import worker_shutting_down

from producer.batch.surroundings import Surroundings
from schemas import InferqError, Outage

_AGAIN_SECONDS = 3.0

_log = logging.getLogger(__name__)


def surroundings_of_jobs() -> Surroundings:
    """Those that the environment names; their waits end as the process is to end. Raises InstallationError.

    They are loaded before a job comes: with a setting that cannot be read, none could be done.
    """
    here = Surroundings.load()
    here.index, here.store  # noqa: B018 - a URL that cannot be read is to be named now
    worker_shutting_down.connect(lambda **_: here.stopping.set(), weak=False)
    return here


def again_unless_done(here: Surroundings, what: str, call: Callable[[], object]) -> None:
    """Do it; where it fails, the message goes back to its queue after a while. `what` is for the log."""
    try:
        call()
    except Outage as error:
        _log.warning("%s: waits, and goes on then: %s", what, error)
    except InferqError as error:
        _log.error("%s: cannot go on, and tries again: %s", what, error)
    except Exception:
        _log.exception("%s: cannot go on, and tries again", what)
    else:
        return
    here.stopping.wait(_AGAIN_SECONDS)
    raise Reject(f"{what} is to go on", requeue=True)
