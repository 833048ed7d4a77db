"""The worker's command."""

from __future__ import annotations

import logging
import signal
from typing import Annotated

import typer

from broker import BrokerSettings
from consumers.settings import WorkerSettings
from schemas import get_type
from storage import StorageSettings

app = typer.Typer()


@app.command()
def worker(
    task_type: Annotated[str, typer.Argument(metavar="TYPE", help="The task type to work for.")],
    lanes: Annotated[str | None, typer.Option(help="The priorities to serve, e.g. high,normal.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Tasks at a time, one engine process each.")
    ] = None,
) -> None:
    """Take tasks of one type and compute them, until SIGTERM. SIGHUP loads the engine anew."""
    from consumers.worker import Worker

    given = {"lanes": lanes, "slots": slots}
    settings = WorkerSettings.load(**{name: value for name, value in given.items() if value is not None})
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s")
    running = Worker(get_type(task_type), settings, BrokerSettings.load(), StorageSettings.load())
    asked = 0

    def stop(_number: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        running.requests.put("hurry" if asked > 1 else "stop")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, lambda _number, _frame: running.requests.put("reload"))
    running.run()
