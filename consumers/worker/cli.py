"""The worker's command."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from inferq.consumers.runtime.start import start_ahead

if TYPE_CHECKING:
    from inferq.schemas import TaskType

app = typer.Typer()


@app.command()
def worker(
    task_types: Annotated[
        str,
        typer.Argument(metavar="TYPE", help="The task type to work for, or several, separated by commas."),
    ],
    lanes: Annotated[str | None, typer.Option(help="The priorities to serve, e.g. high,normal.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Tasks of a type at a time, one engine process each.")
    ] = None,
    max_loaded: Annotated[
        int | None, typer.Option(min=1, help="The most engine processes that are loaded at a time.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only see that settings and installation are in order, and end.")
    ] = False,
) -> None:
    """Compute tasks of one or more types, until SIGTERM. SIGHUP loads the engines anew."""
    names = list(dict.fromkeys(name.strip() for name in task_types.split(",")))
    if not check and max_loaded is None and _loads_at_start():
        for name in names:
            start_ahead(name)  # it loads while this process imports all that follows
    from inferq.broker import BrokerSettings
    from inferq.consumers.gpu_memory import require_room
    from inferq.consumers.worker.settings import WorkerSettings
    from inferq.consumers.worker.worker import Worker
    from inferq.schemas import tracing
    from inferq.schemas.logs import start_log
    from inferq.storage import StorageSettings

    given = {"lanes": lanes, "slots": slots, "max_loaded": max_loaded}
    settings = WorkerSettings.load(**{name: value for name, value in given.items() if value is not None})
    start_log("worker", task_type=",".join(names))
    types, broker, storage = (
        [_installed(name) for name in names],
        BrokerSettings.load(),
        StorageSettings.load(),
    )
    loaded = [each.settings.load() if each.settings is not None else None for each in types]
    require_room([each for each in loaded for _ in range(settings.slots)], at_once=settings.max_loaded)
    if check:
        tracing.wanted()
        for task_type in types:
            _check_engine(task_type)
        return
    running = Worker(types, settings, broker, storage)
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


def _loads_at_start() -> bool:
    """Whether the environment lets all engines load at once. The settings themselves would take long to import."""
    return os.environ.get("INFERQ_LOAD", "").strip() in ("", "eager") and not os.environ.get(
        "INFERQ_MAX_LOADED"
    )


def _installed(task_type: str) -> TaskType:
    """The installed type of that name. Raises InstallationError."""
    from inferq.schemas import InstallationError, InvalidTask, get_type

    try:
        return get_type(task_type)
    except InvalidTask as error:
        raise InstallationError(error.message, code=error.code) from error


def _check_engine(task_type: TaskType) -> None:
    """Import the engine, as its own process would, and ask for its GPU. Raises InstallationError."""
    from inferq.consumers.runtime.child import device_fault, engine_class
    from inferq.schemas import InstallationError

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
