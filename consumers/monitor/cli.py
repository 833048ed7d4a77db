"""The monitor's command."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from inferq.broker import BrokerSettings
from inferq.consumers.monitor.settings import MonitorSettings
from inferq.schemas.logs import LogSettings, start_log
from inferq.storage import StorageSettings

app = typer.Typer()


@app.command()
def monitor(
    check: Annotated[
        bool, typer.Option("--check", help="Check settings and installation, then exit.")
    ] = False,
) -> None:
    """Read figures of queues and workers, until SIGTERM."""
    from inferq.consumers.monitor.monitor import Monitor

    settings, broker, storage = MonitorSettings.load(), BrokerSettings.load(), StorageSettings.load()
    LogSettings.load()
    if check:
        typer.echo("monitor: settings are in order")
        return
    start_log("monitor")
    running = Monitor(settings, broker, storage)

    def stop(_number: int, _frame: object) -> None:
        running.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    running.run()
