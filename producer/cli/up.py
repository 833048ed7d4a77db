"""The commands `inferq up` and `inferq down`."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from inferq.producer.cli.output import console
from inferq.producer.up.folder import DataFolder
from inferq.schemas import InferqError

if TYPE_CHECKING:
    from inferq.producer.up.supervisor import Report

Data = Annotated[Path, typer.Option("--data", help="The folder that keeps all data between runs.")]

app = typer.Typer()


@app.command()
def up(
    data: Data = Path(".inferq"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The gateway's port; 0 takes a free one and keeps it.")
    ] = 8000,
    types: Annotated[
        str | None,
        typer.Option(
            help="Task types to start a worker for, separated by commas (default: all whose engines are installed)."
        ),
    ] = None,
    max_loaded: Annotated[
        int | None,
        typer.Option(
            min=1, help="One worker for all --types, with at most so many engines loaded at a time."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once everything is ready; `inferq down` stops it.")
    ] = False,
) -> None:
    """Start everything, with a private RabbitMQ and Redis."""
    # `inferq down` does not need these modules.
    from inferq.producer.up.detached import start_detached
    from inferq.producer.up.foreground import UpOptions, run_until_stopped
    from inferq.producer.up.plan import choose_types

    if max_loaded is not None and types is None:
        raise typer.BadParameter("it needs --types: the types whose engines share the GPU")
    screen = Screen(console, data, detach=detach)
    try:
        options = UpOptions(data, port, choose_types(types), types is not None, max_loaded)
        if detach:
            screen.ready(start_detached(options, report=screen.report))
        else:
            run_until_stopped(options, report=screen.report, when_ready=lambda plan: screen.ready(plan.facts))
            screen.stopped()
    except InferqError as error:
        screen.failed(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        screen.stopped()
        raise typer.Exit(130) from None


@app.command()
def down(data: Data = Path(".inferq")) -> None:
    """Stop `inferq up`, and wait for its end. The data folder names the one to stop."""
    folder = DataFolder(data)
    pid = folder.holder()
    if not folder.held() or pid is None:
        console.print(Text(f"inferq is not up on {folder.path}"), soft_wrap=True)
        return
    if not stop_supervisor(folder, pid):
        console.print(Text(f"inferq (pid {pid}) on {folder.path} does not stop"), style="red", soft_wrap=True)
        raise typer.Exit(1)
    console.print(Text(f"inferq on {folder.path} has stopped"), soft_wrap=True)


def stop_supervisor(folder: DataFolder, pid: int, *, patience: float = 120.0, insist: float = 40.0) -> bool:
    """Stop the supervisor of a folder; gives whether the folder is free.

    It has `patience` seconds to stop its parts in order. Each further step has `insist` seconds: the orphan
    reaper of a killed supervisor takes up to 30 s.
    """
    # If the supervisor hangs: a second signal stops at once, then a kill; its orphan reaper ends the parts.
    for number, limit in ((signal.SIGTERM, patience), (signal.SIGTERM, insist), (signal.SIGKILL, insist)):
        if not _signal(pid, number) or _gone(folder, limit):
            break
    return _gone(folder, insist)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _gone(folder: DataFolder, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while folder.held():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


class Screen:
    """Prints the parts' progress, the addresses and the end."""

    def __init__(self, console: Console, data: Path, *, detach: bool) -> None:
        self._console = console
        self._data = data
        self._detach = detach
        self._since = time.monotonic()
        self._up = False
        self._starting: list[str] = []
        self._status = console.status("Starting")
        self._status.start()

    def report(self, report: Report) -> None:
        name = report.part
        match report.stage:
            case "starting":
                self._starting.append(name)
            case "ready":
                self._starting = [each for each in self._starting if each != name]
                self._line(f"  {name} is ready", f"({report.seconds:.1f} s)")
            case "ended":
                self._line(f"  {name} {report.text}", f"and starts again in {report.seconds:.1f} s")
            case "failing":
                self._line(f"  {name} keeps failing: it {report.text}; still retrying", style="red")
            case "late":
                self._starting = [each for each in self._starting if each != name]
                self._line(f"  {name} is not ready yet: it {report.text}; still retrying", style="red")
            case "left out":
                self._starting = [each for each in self._starting if each != name]
                self._line(f"  {name} is left out: it {report.text}", style="red")
            case "stopping":
                self._status.update("Stopping")
                self._status.start()
                return
        if self._starting and not self._up:
            self._status.update(Text("Starting " + ", ".join(self._starting)))

    def ready(self, facts: Mapping[str, str]) -> None:
        self._up = True
        self._status.stop()
        table = Table.grid(padding=(0, 2))
        for label, text in facts.items():
            table.add_row(Text(f"  {label}", style="dim"), Text(text, overflow="fold"))
        self._console.print(
            Text(f"inferq is ready ({time.monotonic() - self._since:.1f} s)", style="bold green")
        )
        self._console.print(table)
        stop = f"inferq down --data {shlex.quote(str(self._data))}" if self._detach else "Ctrl-C"
        self._console.print(Text(f"  Stop it with {stop}", style="dim"))

    def stopped(self) -> None:
        self._status.stop()
        self._line("inferq has stopped")

    def failed(self, error: InferqError) -> None:
        self._status.stop()
        self._line(f"inferq up: {error.message}", style="red")

    def _line(self, text: str, aside: str = "", *, style: str = "") -> None:
        self._console.print(
            Text.assemble((text, style), " " if aside else "", (aside, "dim")), soft_wrap=True
        )
