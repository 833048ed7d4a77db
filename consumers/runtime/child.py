"""The engine process: loads one engine and computes the tasks that its worker sends.

`python -P -m inferq.consumers.runtime.child TYPE FD PID` starts it: it shares no memory with the worker, and it
does not outlive the worker.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import socket
import sys
from typing import Any

from inferq.consumers.engine import Engine, EngineSettings
from inferq.consumers.machine import die_with, gpu_fault
from inferq.consumers.runtime.channel import Channel
from inferq.consumers.runtime.computing import compute, compute_group, out_of_memory, read_task
from inferq.consumers.runtime.messages import (
    Abort,
    LoadFailed,
    Prepare,
    Ready,
    Run,
    RunGroup,
    from_worker,
    send,
)
from inferq.consumers.runtime.output import flush_output, log_engine, start_engine_log
from inferq.consumers.runtime.process_tree import adopt_descendants
from inferq.consumers.runtime.settings import EngineProcessSettings
from inferq.consumers.weights.cache import weights_in_use
from inferq.schemas import (
    EngineInfo,
    InferqError,
    InstallationError,
    InvalidTask,
    Task,
    TaskType,
    get_type,
)
from inferq.standard_streams import open_standard_streams

_log = logging.getLogger(__name__)

_LARGEST_BYTES = 2**32
"""The largest message of the worker: a group may be hundreds of tasks. The worker is trusted."""


def main() -> None:
    """Run the engine of the type and on the pipe that the command line names."""
    open_standard_streams()
    type_name, fd, worker_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if not die_with(worker_pid):
        sys.exit("the worker is gone")
    adopt_descendants()  # so that the worker finds them when it ends this process
    # The worker decides when a run ends, even if Ctrl-C interrupts all processes of its terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_engine_log()
    os.set_inheritable(fd, False)  # a program that the engine starts would hold it open
    pipe = Channel(socket.socket(fileno=fd), largest=_LARGEST_BYTES)
    try:
        _serve(get_type(type_name), pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _serve(task_type: TaskType, pipe: Channel) -> None:
    log_engine(task_type.engine)
    try:
        engine = engine_class(task_type)()
        info = engine.load().model_copy(update={"weights": weights_in_use()})
        _check_precision(task_type, info)
        for _ in range(EngineProcessSettings.load().warmup):
            engine.warm_up()
        read_task(json.dumps({"task_type": task_type.name}))  # parsing the first task is slow
        ready = Ready(engine=info, batch_size=engine.batch_size)
    except Exception as error:
        if isinstance(error, InferqError):
            code, message = error.code, str(error)
            fault = device_fault(task_type) if code == "device_unavailable" else None
            if fault is not None and fault not in message:
                message = f"{fault}. {message}"
        else:
            _log.exception("engine %s cannot be loaded", task_type.engine)
            code, message = "engine_load_failed", f"{type(error).__name__}: {error}"
            if isinstance(error, ImportError):
                code = "engine_not_installed"
        permanent = isinstance(error, InstallationError | ImportError)
        if out_of_memory(error):  # another process may hold the memory for now
            code, permanent = "out_of_memory", False
        send(pipe, LoadFailed(code=code, message=message[:4000], permanent=permanent))
        return
    flush_output()
    send(pipe, ready)
    task: Task | InvalidTask = InvalidTask("no task was prepared")
    try:
        while True:
            match from_worker(pipe):
                case Prepare(task=body):
                    task = read_task(body)
                case Run(task=body) as run:
                    if body is not None:
                        task = read_task(body)
                    answer = compute(engine, task_type, task, run, pipe)
                    flush_output()
                    send(pipe, answer)
                case RunGroup() as group:
                    compute_group(engine, task_type, group, pipe)
                case Abort():
                    pass  # too late: its run has ended
    finally:
        engine.close()


def engine_class(task_type: TaskType) -> type[Engine[Any]]:
    """Import the engine of a type. Raises ImportError, and InstallationError if it is not an Engine."""
    module, _, name = task_type.engine.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise InstallationError(f"{task_type.engine} is not an inferq.engine.Engine")
    return found


def device_fault(task_type: TaskType) -> str | None:
    """Why the GPU that the type's settings name cannot be used; None if it can, or none is needed."""
    settings = task_type.settings.load() if task_type.settings is not None else None
    if not isinstance(settings, EngineSettings) or settings.gpu is None:
        return None
    return gpu_fault(settings.gpu)


def _check_precision(task_type: TaskType, engine: EngineInfo) -> None:
    """Raises InstallationError if the engine did not heed INFERQ_PRECISION, as one that does not know it."""
    settings = task_type.settings.load() if task_type.settings is not None else None
    if isinstance(settings, EngineSettings) and settings.precision not in {None, engine.precision}:
        raise InstallationError(
            f"INFERQ_PRECISION={settings.precision}, but {engine.name} computes in "
            f"{engine.precision or 'a precision that it does not name'}: leave INFERQ_PRECISION out",
            code="bad_settings",
        )


if __name__ == "__main__":
    main()
