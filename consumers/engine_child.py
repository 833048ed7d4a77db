"""The engine process: loads one engine and computes what its worker sends.

It is started as `python -m consumers.engine_child TYPE FD PID`, so nothing of the worker's memory comes
along, and it does not outlive the worker.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from consumers.engine import Context, Engine, InputFile, TaskAborted
from consumers.engine_messages import (
    INLINE_OUTPUT_BYTES,
    OUTPUT_ARTIFACT,
    Abort,
    Aborted,
    Done,
    Failed,
    FileNote,
    Progress,
    Ready,
    Run,
    Unable,
    from_worker,
    send,
)
from schemas import (
    InferqError,
    InstallationError,
    InvalidTask,
    TaskType,
    TransientFailure,
    describe_faults,
    get_type,
    parse_task,
)

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.2
"""The least time between two progress messages; an engine may report as often as it likes."""


def main() -> None:
    """Run the engine of the type and on the pipe that the command line names."""
    type_name, fd, worker_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _die_with(worker_pid)
    # The worker decides when a run ends; a Ctrl-C at the terminal reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("INFERQ_LOG_LEVEL", "INFO"), format="%(message)s")
    # Frameworks print to standard output; it belongs to whoever started the worker.
    os.dup2(2, 1)
    pipe = Connection(fd)
    try:
        _serve(get_type(type_name), pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _die_with(worker_pid: int) -> None:
    """Have the kernel kill this process when its worker ends, however that ends (Linux)."""
    if sys.platform != "linux":
        return  # elsewhere the closed pipe ends it, after the run in hand
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != worker_pid:
        sys.exit("the worker is gone")


def _serve(task_type: TaskType, pipe: Connection) -> None:
    try:
        engine = _load_class(task_type)()
        info = engine.load()
        engine.warm_up()
    except Exception as error:
        known = isinstance(error, InferqError)
        if not known:
            _log.exception("engine %s cannot be loaded", task_type.engine)
        code = error.code if isinstance(error, InferqError) else "engine_load_failed"
        message = str(error) if known else f"{type(error).__name__}: {error}"
        permanent = isinstance(error, InstallationError | ImportError)
        send(pipe, Unable(code=code, message=message[:4000], permanent=permanent))
        return
    send(pipe, Ready(engine=info))
    try:
        while True:
            order = from_worker(pipe)
            if isinstance(order, Run):  # an abort here comes too late: its run has ended
                send(pipe, _run(engine, task_type, order, pipe))
    finally:
        engine.close()


def _load_class(task_type: TaskType) -> type[Engine[Any]]:
    module, _, name = task_type.engine.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise InstallationError(f"{task_type.engine} is not a consumers.engine.Engine")
    return found


def _run(engine: Engine[Any], task_type: TaskType, run: Run, pipe: Connection) -> BaseModel:
    began = time.monotonic()
    context = Context(
        folder=Path(run.scratch),
        inputs={
            name: InputFile(note.path, note.bytes, note.content_type) for name, note in run.inputs.items()
        },
        report=_Reporter(pipe),
        abort_requested=_AbortFlag(pipe),
    )
    try:
        output = engine.run(parse_task(run.task), context)
        return _done(task_type, output, context, time.monotonic() - began)
    except TaskAborted:
        return Aborted()
    except InvalidTask as error:
        return _failed(error.code, error.message, began, invalid=True)
    except TransientFailure as error:
        return _failed(error.code, error.message, began)
    except Exception as error:
        _log.exception("task failed in engine %s", task_type.engine)
        code = "out_of_memory" if isinstance(error, MemoryError) else "engine_error"
        return _failed(code, f"{type(error).__name__}: {error}", began)


def _failed(code: str, message: str, began: float, *, invalid: bool = False) -> Failed:
    return Failed(code=code, message=message[:4000], invalid=invalid, seconds=time.monotonic() - began)


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
    text = checked.model_dump_json()
    inline: str | None = None
    if len(text.encode()) > INLINE_OUTPUT_BYTES:
        context.artifact(OUTPUT_ARTIFACT, "application/json").write_text(text, "utf-8")
    else:
        inline = text
    artifacts = {}
    for artifact in context.artifacts:
        if not artifact.path.is_file():
            raise TransientFailure(
                f"the engine announced artifact {artifact.name!r} and did not write it", code="engine_error"
            )
        size = artifact.path.stat().st_size
        artifacts[artifact.name] = FileNote(
            path=artifact.path, content_type=artifact.content_type, bytes=size
        )
    return Done(output=inline, artifacts=artifacts, seconds=seconds)


class _Reporter:
    """Sends progress on, no more often than anybody wants to see it, and never backwards."""

    def __init__(self, pipe: Connection) -> None:
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
    """Whether the worker has asked to stop; looks at the pipe only when the engine asks."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._asked = False

    def __call__(self) -> bool:
        while not self._asked and self._pipe.poll(0):
            self._asked = isinstance(from_worker(self._pipe), Abort)
        return self._asked


if __name__ == "__main__":
    main()
