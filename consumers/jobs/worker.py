"""Runs the light jobs: a Celery worker with threads. The jobs come from entry points."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from celery import Celery, bootsteps, signals
from celery.apps import worker as celery_worker
from pika.exceptions import AMQPConnectionError
from prometheus_client import make_wsgi_app

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
from inferq.consumers.batches.services import load_services
from inferq.consumers.jobs.dropped import DroppedTasks
from inferq.consumers.probes.registry import REGISTRY
from inferq.consumers.probes.settings import ProbeSettings
from inferq.schemas import InstallationError, Outage
from inferq.schemas.probe_server import ProbeServer, Readiness
from inferq.storage import StorageSettings, StoreWatch, open_store

_log = logging.getLogger(__name__)

_CALLBACKS_PER_THREAD = 8


def application(settings: BrokerSettings) -> Celery:
    """The Celery application with all installed jobs. Raises InstallationError."""
    app = celery_app(settings)
    for point in sorted(entry_points(group=JOB_ENTRY_POINTS), key=lambda point: point.name):
        try:
            add: Callable[[Celery], None] = point.load()
        except ImportError as error:
            raise InstallationError(
                f"cannot import the jobs {point.name!r}: {error}; install their packages: "
                "pip install 'inferq[jobs]'",
                code="jobs_not_installed",
            ) from error
        add(app)
    return app


def check_jobs(app: Celery, queues: Sequence[JobQueue]) -> None:
    """Raises InstallationError if this process cannot run every job of these queues.

    Otherwise it would reject jobs that other processes could run, and retry batches forever without a
    writable temporary folder.
    """
    missing = [name for queue in queues for name in QUEUE_JOBS[queue] if name not in app.tasks]
    if missing:
        raise InstallationError(
            f"jobs of {', '.join(queues)} are not installed: {', '.join(missing)}; "
            f"entry-point group {JOB_ENTRY_POINTS!r} lacks them; install them: pip install 'inferq[jobs]'",
            code="jobs_not_installed",
        )
    if "inference.batches" in queues:
        try:
            tempfile.gettempdir()
        except OSError as error:
            raise InstallationError(
                f"batches need temporary files, and none can be written: {error.strerror}; set TMPDIR to a "
                "writable folder, or run without batches (--queues callbacks)"
            ) from error


def work(
    app: Celery,
    queues: Sequence[JobQueue],
    *,
    threads: int,
    broker: BrokerSettings,
    probes: ProbeSettings,
) -> int:
    """Run the jobs of these queues until SIGTERM, then finish the running ones. Returns the exit status.

    Raises InstallationError and TopologyMismatch.
    """
    check_jobs(app, queues)
    # Callbacks are delivered without Redis; batches are not fed.
    needed = {"Redis": load_services().status.ping} if "inference.batches" in queues else {}
    consuming = Consuming(needed)
    server = None
    store = StoreWatch(open_store(StorageSettings.load()))
    if probes.probe_port is not None:
        server = ProbeServer(
            probes.probe_host,
            probes.probe_port,
            readiness=lambda: consuming.readiness(store.waiting_for),
            metrics=make_wsgi_app(REGISTRY),
        )
        server.start()
        store.start()
    if not declare(broker):
        for queue in app.amqp.queues.values():
            queue.no_declare = True
    worker = app.Worker(
        queues=list(queues),
        pool="threads",
        concurrency=threads,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel=None,
        # A callback over its target's limit is deferred without a thread, so many can be prefetched. Other
        # jobs may take long: prefetched ones would be kept from idle processes.
        prefetch_multiplier=_CALLBACKS_PER_THREAD if set(queues) == {"inference.callbacks"} else 1,
    )
    dropped = (
        DroppedTasks(replace(load_services(), broker=broker)) if "inference.callbacks" in queues else None
    )
    if dropped is not None:
        dropped.start()
    consuming.watch(worker)
    _log.info("consuming %s", ", ".join(queues))
    gc.freeze()  # a full collection of what is loaded takes 0.1 s, and callbacks would wait for it
    celery_worker.safe_say = _unsaid
    worker.start()
    _log.info("stopped")
    if dropped is not None:
        dropped.stop()
    if server is not None:
        server.close()
        store.close()
    return int(worker.exitcode or 0)


def _unsaid(*_arguments: object) -> None:
    """Stands in for what Celery prints of signals, past every log."""


def declare(settings: BrokerSettings) -> bool:
    """Declare the jobs' exchanges and queues; waits until RabbitMQ is available, or has those that it may not declare.

    Returns False if the broker user may not declare, and everything exists. Raises TopologyMismatch.

    Celery declares delayed delivery too, but gives up after a few failures and starts without it.
    """
    failures = 0
    while True:
        try:
            with closing(connect(settings, name="jobs")) as connection:
                declared = job_topology().ensure(connection)
        except (BrokerUnavailable, AMQPConnectionError) as error:
            failures += 1
            pause = backoff(failures)
            _log.warning("waiting for RabbitMQ, next attempt in %.1f s: %s", pause, error)
            time.sleep(pause)
        else:
            return declared


class Consuming:
    """Whether the Celery worker is consuming, and can use the services that its jobs need.

    Each of `needed` raises Outage if its service cannot be used.
    """

    def __init__(self, needed: Mapping[str, Callable[[], None]]) -> None:
        self._needed = needed
        self._worker: Any = None

    def watch(self, worker: Any) -> None:
        def ready(sender: Any, **_about: Any) -> None:
            if sender.controller is worker:
                self._worker = worker

        self._ready = ready  # Celery keeps only a weak reference
        signals.worker_ready.connect(ready)

    def readiness(self, *waiting_for: str | None) -> Readiness:
        """`waiting_for`: what else it waits for, None for each service that is available."""
        waiting = [each for each in ("RabbitMQ" if not self._connected() else None, *waiting_for) if each]
        for service, check in self._needed.items():
            try:
                check()
            except Outage as error:
                waiting.append(f"{service}: {error}")
        return Readiness(not waiting, tuple(waiting))

    def _connected(self) -> bool:
        if self._worker is None:
            return False
        consumer = self._worker.consumer
        return bool(
            consumer.blueprint.state == bootsteps.RUN
            and consumer.connection is not None
            and bool(consumer.connection.connected)
        )
