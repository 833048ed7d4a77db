"""The scale-in guard's command."""

from __future__ import annotations

import signal
import socket
from typing import Annotated

import typer

from inferq.consumers.scale_in.settings import ScaleInSettings
from inferq.schemas.logs import LogSettings, start_log
from inferq.storage import StorageSettings

app = typer.Typer()


@app.command()
def scale_in_guard(
    check: Annotated[
        bool, typer.Option("--check", help="Check settings and installation, then exit.")
    ] = False,
) -> None:
    """Let scale-in remove idle workers only, until SIGTERM."""
    from inferq.consumers.scale_in.api import connect, own_namespace
    from inferq.consumers.scale_in.guard import ScaleInGuard

    settings, storage = ScaleInSettings.load(), StorageSettings.load()
    LogSettings.load()
    if check:
        typer.echo("scale-in-guard: settings are in order")
        return
    start_log("scale-in-guard")
    guard = ScaleInGuard(
        settings,
        storage,
        connect(),
        namespace=settings.scale_in_namespace or own_namespace(),
        identity=socket.gethostname(),  # the pod's name: a container that restarts goes on at once
    )

    def stop(_number: int, _frame: object) -> None:
        guard.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    guard.run()
