"""Works on the light jobs: a Celery worker whose jobs come from entry points, on threads of one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from celery import Celery

from broker import JOB_ENTRY_POINTS, BrokerSettings, JobQueue
from broker.celery_app import celery_app
from schemas import InstallationError

_log = logging.getLogger(__name__)


def application(settings: BrokerSettings) -> Celery:
    """The Celery application with every installed job. Raises InstallationError."""
    app = celery_app(settings)
    for point in sorted(entry_points(group=JOB_ENTRY_POINTS), key=lambda point: point.name):
        try:
            add: Callable[[Celery], None] = point.load()
        except ImportError as error:
            raise InstallationError(
                f"the jobs {point.name!r} cannot be imported: {error}; install their packages: "
                "pip install 'inferq[jobs]'"
            ) from error
        add(app)
    return app


def work(app: Celery, queues: Sequence[JobQueue], *, threads: int) -> int:
    """Work on the jobs of these queues until SIGTERM; jobs in hand are finished. Gives the exit status."""
    worker = app.Worker(
        queues=list(queues),
        pool="threads",
        concurrency=threads,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel=None,
    )
    _log.info("works on %s", ", ".join(queues))
    worker.start()
    return int(worker.exitcode or 0)
