"""The command that runs the light jobs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from inferq.broker import JOB_QUEUES, BrokerSettings, JobQueue

# `inferq settings` lists the settings that the modules of commands have loaded.
from inferq.consumers.batches.settings import BatchSettings  # noqa: F401
from inferq.consumers.callbacks.settings import CallbackSettings  # noqa: F401
from inferq.consumers.probes.settings import ProbeSettings
from inferq.schemas import InstallationError, tracing
from inferq.schemas.logs import LogSettings, start_log

app = typer.Typer()

_PREFIX = "inference."
_LOW_PRIORITY = 5
"""The nice value of a process that only feeds batches. Feeding uses all the CPU time it gets; the broker,
the gateway and the workers on the same machine go first."""


@app.command()
def callbacks(
    queues: Annotated[
        str | None, typer.Option(help="Only these job queues: callbacks, batches (default: both).")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1000, help="Jobs at a time.")] = 64,
    check: Annotated[
        bool, typer.Option("--check", help="Check settings and installation, then exit.")
    ] = False,
) -> None:
    """Deliver callbacks and feed batches, until SIGTERM."""
    from inferq.consumers.jobs.worker import application, check_jobs, work

    chosen = _chosen(queues)
    broker, probes = BrokerSettings.load(), ProbeSettings.load()
    LogSettings.load()
    part = "batches" if chosen == ("inference.batches",) else "callbacks"
    if not check:
        start_log(part)  # before the jobs: their services log
    jobs = application(broker)
    check_jobs(jobs, chosen)
    if check:
        tracing.wanted()
        names = sorted(name for name in jobs.tasks if not name.startswith("celery."))
        typer.echo(f"callbacks: settings are in order; jobs: {', '.join(names) or 'none'}")
        return
    if chosen == ("inference.batches",):
        os.nice(_LOW_PRIORITY)
    with tracing.exporting(part):
        status = work(jobs, chosen, threads=threads, broker=broker, probes=probes)
    raise typer.Exit(status)


def _chosen(names: str | None) -> tuple[JobQueue, ...]:
    if names is None:
        return JOB_QUEUES
    wanted = [f"{_PREFIX}{name.strip().removeprefix(_PREFIX)}" for name in names.split(",") if name.strip()]
    chosen = tuple(queue for queue in JOB_QUEUES if queue in wanted)
    if not chosen or len(chosen) != len(set(wanted)):
        known = ", ".join(queue.removeprefix(_PREFIX) for queue in JOB_QUEUES)
        raise InstallationError(f"--queues {names!r} is not a list of job queues; there are: {known}")
    return chosen
