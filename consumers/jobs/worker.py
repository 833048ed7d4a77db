"""Works on the light jobs: a Celery worker whose jobs come from entry points, on threads of one process."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import entry_points
from typing import Any

from celery import Celery, bootsteps, signals
from pika.exceptions import AMQPConnectionError

from inferq.broker import (
    JOB_ENTRY_POINTS,
    QUEUE_JOBS,
    BrokerSettings,
    BrokerUnavailable,
    JobQueue,
    backoff,
    connect,
    job_topology,
)
from inferq.broker.celery_app import celery_app
from inferq.consumers.probes.registry import REGISTRY
from inferq.consumers.probes.server import ProbeServer, Readiness
from inferq.consumers.probes.settings import ProbeSettings
from inferq.schemas import InstallationError

_log = logging.getLogger(__name__)

_CALLBACKS_PER_THREAD = 8


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


def check_jobs(app: Celery, queues: Sequence[JobQueue]) -> None:
    """Raises InstallationError where a job that comes by these queues is missing, or cannot be done here.

    Celery would reject what others could do, and try a batch for ever that cannot write its files.
    """
    missing = [name for queue in queues for name in QUEUE_JOBS[queue] if name not in app.tasks]
    if missing:
        raise InstallationError(
            f"jobs that come by {', '.join(queues)} are not installed: {', '.join(missing)}; "
            f"entry-point group {JOB_ENTRY_POINTS!r} lacks them; install inferq: pip install 'inferq[jobs]'"
        )
    if "inference.batches" in queues:
        try:
            tempfile.gettempdir()
        except OSError as error:
            raise InstallationError(
                f"batches need temporary files, and none can be written: {error.strerror}; set TMPDIR to a "
                "writable folder, or leave batches to others (--queues callbacks)"
            ) from error


def work(
    app: Celery,
    queues: Sequence[JobQueue],
    *,
    threads: int,
    broker: BrokerSettings,
    probes: ProbeSettings,
) -> int:
    """Work on the jobs of these queues until SIGTERM; jobs in hand are finished. Gives the exit status.

    Raises InstallationError and TopologyMismatch.
    """
    check_jobs(app, queues)
    consuming = _Consuming()
    server = None
    if probes.probe_port is not None:
        server = ProbeServer(
            probes.probe_host,
            probes.probe_port,
            healthy=lambda: True,
            readiness=consuming.readiness,
            registry=REGISTRY,
        )
        server.start()
    declare_patiently(broker)
    worker = app.Worker(
        queues=list(queues),
        pool="threads",
        concurrency=threads,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel=None,
        # Callbacks never wait for a thread, as they are put aside where they may not run: so many may come
        # at once. A job of another kind may last, and must not be held from other processes meanwhile.
        prefetch_multiplier=_CALLBACKS_PER_THREAD if set(queues) == {"inference.callbacks"} else 1,
    )
    consuming.watch(worker)
    _log.info("works on %s", ", ".join(queues))
    gc.freeze()  # what is loaded stays: looking through all of it for garbage takes a tenth of a second
    worker.start()
    if server is not None:
        server.close()
    return int(worker.exitcode or 0)


def declare_patiently(settings: BrokerSettings) -> None:
    """Declare what the jobs need, as soon as the broker is there. Raises TopologyMismatch.

    Celery would go on without delayed delivery where its own declaring failed a few times as it started.
    """
    failures = 0
    while True:
        try:
            with closing(connect(settings, name="jobs")) as connection:
                job_topology().apply(connection.channel())
        except (BrokerUnavailable, AMQPConnectionError) as error:
            failures += 1
            pause = backoff(failures)
            _log.warning("waits for RabbitMQ, next try in %.1f s: %s", pause, error)
            time.sleep(pause)
        else:
            return


class _Consuming:
    """Whether the Celery worker consumes at this moment."""

    def __init__(self) -> None:
        self._worker: Any = None

    def watch(self, worker: Any) -> None:
        def ready(sender: Any, **_about: Any) -> None:
            if sender.controller is worker:
                self._worker = worker

        self._ready = ready  # Celery keeps no more than a weak reference
        signals.worker_ready.connect(ready)

    def readiness(self) -> Readiness:
        if self._worker is None:
            return Readiness(False, ("RabbitMQ",))
        consumer = self._worker.consumer
        connected = (
            consumer.blueprint.state == bootsteps.RUN
            and consumer.connection is not None
            and consumer.connection.connected
        )
        return Readiness(connected, () if connected else ("RabbitMQ",))
