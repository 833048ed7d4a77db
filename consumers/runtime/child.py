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
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from inferq.consumers.engine import Context, Engine, EngineSettings, InputFile, TaskAborted
from inferq.consumers.machine import die_with, gpu_fault
from inferq.consumers.runtime.channel import Channel
from inferq.consumers.runtime.messages import (
    INLINE_OUTPUT_BYTES,
    Abort,
    Aborted,
    Done,
    Failed,
    FileRef,
    LoadFailed,
    Prepare,
    Progress,
    Ready,
    Run,
    from_worker,
    send,
)
from inferq.consumers.runtime.output import flush_output, log_engine, start_engine_log
from inferq.consumers.runtime.process_tree import adopt_descendants
from inferq.consumers.runtime.settings import EngineProcessSettings
from inferq.consumers.weights.cache import weights_in_use
from inferq.schemas import (
    InferqError,
    InstallationError,
    InvalidTask,
    Task,
    TaskType,
    TransientFailure,
    describe_faults,
    get_type,
    parse_task,
    report_incident,
)
from inferq.schemas.result import OUTPUT_ARTIFACT
from inferq.schemas.standard_streams import open_standard_streams

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.2
"""The least time between two progress messages; an engine may report as often as it likes."""


_OUT_OF_MEMORY_TYPES = {"OutOfMemoryError", "ResourceExhaustedError"}
"""The names of torch's, cupy's and tensorflow's errors; importing them only to compare types would be slow."""

_OUT_OF_MEMORY_SIGNS = (
    "out of memory",  # CUDA itself, paddle, jax
    "resourceexhausted",
    "resource_exhausted",
    "failed to allocate memory",  # onnxruntime
    "can't allocate memory",  # torch on a CPU
    "_status_alloc_failed",  # cuBLAS, cuDNN
)


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
    pipe = Channel(socket.socket(fileno=fd))
    try:
        _serve(get_type(type_name), pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _serve(task_type: TaskType, pipe: Channel) -> None:
    log_engine(task_type.engine)
    try:
        engine = engine_class(task_type)()
        info = engine.load().model_copy(update={"weights": weights_in_use()})
        for _ in range(EngineProcessSettings.load().warmup):
            engine.warm_up()
        _read(json.dumps({"task_type": task_type.name}))  # parsing the first task is slow
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
    send(pipe, Ready(engine=info))
    task: Task | InvalidTask = InvalidTask("no task was prepared")
    try:
        while True:
            match from_worker(pipe):
                case Prepare(task=body):
                    task = _read(body)
                case Run(task=body) as run:
                    if body is not None:
                        task = _read(body)
                    answer = _run(engine, task_type, task, run, pipe)
                    flush_output()
                    send(pipe, answer)
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


def _read(body: str) -> Task | InvalidTask:
    try:
        return parse_task(body)
    except InvalidTask as error:  # the worker has another version of the type
        return error


def _run(
    engine: Engine[Any], task_type: TaskType, task: Task | InvalidTask, run: Run, pipe: Channel
) -> BaseModel:
    began = time.monotonic()
    context = Context(
        folder=Path(run.scratch),
        inputs={
            name: InputFile(note.path, note.bytes, note.content_type) for name, note in run.inputs.items()
        },
        report=_Reporter(pipe),
        abort_requested=_AbortFlag(pipe),
        time_limit=run.time_limit,
    )
    try:
        if isinstance(task, InvalidTask):
            raise task
        output = engine.run(task, context)
        return _done(task_type, output, context, time.monotonic() - began)
    except TaskAborted:
        return Aborted()
    except Exception as error:
        return _failed(error, task_type, time.monotonic() - began)


def _failed(error: Exception, task_type: TaskType, seconds: float) -> Failed:
    memory = out_of_memory(error)
    if isinstance(error, InvalidTask | TransientFailure):
        code, message = error.code, error.message
    else:
        code = "out_of_memory" if memory else "engine_error"
        message = report_incident(_log, f"a task failed in engine {task_type.engine}", error)
    return Failed(
        code=code,
        message=message[:4000],
        invalid=isinstance(error, InvalidTask),
        out_of_memory=memory,
        seconds=seconds,
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error or one of its causes says that memory ran out, the machine's or a GPU's."""
    cause: BaseException | None = error
    while cause is not None:
        # paddle's ResourceExhausted becomes a MemoryError in Python.
        if isinstance(cause, MemoryError) or type(cause).__name__ in _OUT_OF_MEMORY_TYPES:
            return True
        # Errors of the engine's own, and errors about a value, may quote the task.
        if not isinstance(cause, InferqError | ValueError | LookupError):
            said = str(cause).lower()
            if any(sign in said for sign in _OUT_OF_MEMORY_SIGNS):
                return True
        cause = cause.__cause__
    return False


def _done(
    task_type: TaskType, output: BaseModel | Mapping[str, Any], context: Context, seconds: float
) -> Done:
    try:
        checked = output if isinstance(output, task_type.output) else task_type.output.model_validate(output)
    except ValidationError as error:
        raise TransientFailure(
            f"the engine's output is not a {task_type.output.__name__}: {'; '.join(describe_faults(error))}",
            code="engine_error",
        ) from error
    inline: bytes | None = checked.model_dump_json().encode()
    if inline is not None and len(inline) > INLINE_OUTPUT_BYTES:
        context.artifact(OUTPUT_ARTIFACT, "application/json").write_bytes(inline)
        inline = None
    artifacts = {}
    for artifact in context.artifacts:
        if not artifact.path.is_file():
            raise TransientFailure(
                f"the engine announced artifact {artifact.name!r} and did not write it", code="engine_error"
            )
        size = artifact.path.stat().st_size
        artifacts[artifact.name] = FileRef(path=artifact.path, content_type=artifact.content_type, bytes=size)
    return Done(output=inline, artifacts=artifacts, seconds=seconds)


class _Reporter:
    """Sends progress to the worker, at most once in _PROGRESS_SECONDS, and never backwards."""

    def __init__(self, pipe: Channel) -> None:
        self._pipe = pipe
        self._last_time = 0.0
        self._furthest = 0.0

    def __call__(self, fraction: float, note: str) -> None:
        self._furthest = max(self._furthest, fraction)
        now = time.monotonic()
        if now - self._last_time >= _PROGRESS_SECONDS:
            self._last_time = now
            send(self._pipe, Progress(fraction=self._furthest, note=note[:200]))


class _AbortFlag:
    """Whether the worker asked the run to stop; reads the pipe only when the engine asks."""

    def __init__(self, pipe: Channel) -> None:
        self._pipe = pipe
        self._asked = False

    def __call__(self) -> bool:
        while not self._asked and self._pipe.poll(0):
            self._asked = isinstance(from_worker(self._pipe), Abort)
        return self._asked


if __name__ == "__main__":
    main()
