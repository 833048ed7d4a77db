"""The worker's command."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from inferq.broker import BrokerSettings
from inferq.consumers.gpu_memory import require_room
from inferq.consumers.worker.settings import WorkerSettings
from inferq.schemas import InstallationError, InvalidTask, TaskType, get_type, tracing
from inferq.schemas.logs import start_log
from inferq.storage import StorageSettings

app = typer.Typer()


@app.command()
def worker(
    task_type: Annotated[str, typer.Argument(metavar="TYPE", help="The task type to work for.")],
    lanes: Annotated[str | None, typer.Option(help="The priorities to serve, e.g. high,normal.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Tasks at a time, one engine process each.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only see that settings and installation are in order, and end.")
    ] = False,
) -> None:
    """Compute the tasks of one type, until SIGTERM. SIGHUP loads the engine anew."""
    from inferq.consumers.worker.worker import Worker

    given = {"lanes": lanes, "slots": slots}
    settings = WorkerSettings.load(**{name: value for name, value in given.items() if value is not None})
    start_log("worker", task_type=task_type)
    engine_type, broker, storage = _installed(task_type), BrokerSettings.load(), StorageSettings.load()
    engine_settings = engine_type.settings.load() if engine_type.settings is not None else None
    require_room([engine_settings] * settings.slots)
    if check:
        tracing.wanted()
        _check_engine(engine_type)
        return
    running = Worker(engine_type, settings, broker, storage)
    asked = 0

    def stop(_number: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        running.requests.put("hurry" if asked > 1 else "stop")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, lambda _number, _frame: running.requests.put("reload"))
    with tracing.exporting("worker"):
        running.run()


def _installed(task_type: str) -> TaskType:
    """The installed type of that name. Raises InstallationError."""
    try:
        return get_type(task_type)
    except InvalidTask as error:
        raise InstallationError(error.message, code=error.code) from error


def _check_engine(task_type: TaskType) -> None:
    """Import the engine, as its own process would, and ask for its GPU. Raises InstallationError."""
    from inferq.consumers.runtime.child import device_fault, engine_class

    try:
        engine = engine_class(task_type)
    except ImportError as error:
        raise InstallationError(
            f"the {task_type.name} engine cannot be imported: {error}; "
            f"install its packages: pip install '{task_type.distribution}[{task_type.name}]'",
            code="engine_not_installed",
        ) from error
    if (fault := device_fault(task_type)) is not None:
        raise InstallationError(
            f"the {task_type.name} engine is set to compute on a GPU, but {fault}; give the container a GPU "
            "(docker run --gpus all), install NVIDIA's driver, or set INFERQ_DEVICE=cpu",
            code="device_unavailable",
        )
    typer.echo(f"worker {task_type.name}: settings are in order, {engine.__qualname__} can be imported")
