"""Computing in the engine process: one task alone, or the tasks of a group in batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from inferq.consumers.engine import Context, Engine, InputFile, TaskAborted
from inferq.consumers.runtime.channel import Channel
from inferq.consumers.runtime.messages import (
    INLINE_OUTPUT_BYTES,
    Abort,
    Aborted,
    Alone,
    BatchBegun,
    Done,
    Failed,
    FileRef,
    Job,
    Progress,
    Run,
    RunGroup,
    from_worker,
    send,
    send_all,
)
from inferq.consumers.runtime.output import flush_output
from inferq.schemas import (
    InferqError,
    InvalidTask,
    Task,
    TaskType,
    TransientFailure,
    describe_faults,
    parse_task,
    report_incident,
)
from inferq.schemas.result import OUTPUT_ARTIFACT

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.2
"""The least time between two progress messages of a job; an engine may report as often as it likes."""

_OUT_OF_MEMORY_TYPES = {"OutOfMemoryError", "ResourceExhaustedError"}
"""The names of torch's, cupy's and tensorflow's errors; importing them only to compare types would be slow."""

_OUT_OF_MEMORY_SIGNS = (
    "out of memory",  # CUDA itself, paddle, jax
    "resourceexhausted",
    "resource_exhausted",
    "failed to allocate memory",  # onnxruntime
    "is smaller than requested bytes",  # the same at the limit of its arena
    "can't allocate memory",  # torch on a CPU
    "_status_alloc_failed",  # cuBLAS, cuDNN
)


def read_task(body: str) -> Task | InvalidTask:
    """Parse a task. The error comes back as a value: it fails the run of this task."""
    try:
        return parse_task(body)
    except InvalidTask as error:  # the worker has another version of the type
        return error


def compute(
    engine: Engine[Any], task_type: TaskType, task: Task | InvalidTask, run: Run, pipe: Channel
) -> Done | Failed | Aborted:
    """Compute one task, and give the answer for the worker."""
    context = _context(0, run, run.time_limit, pipe, _Aborts(pipe))
    return _compute_alone(engine, task_type, 0, task, context)


def compute_group(engine: Engine[Any], task_type: TaskType, group: RunGroup, pipe: Channel) -> None:
    """Compute the jobs of a group in batches, and answer each as soon as its batch is done.

    A batch has the key of the first job that waits. A job that the worker asks to stop before that is left out.
    """
    aborts = _Aborts(pipe)
    waiting: dict[int, tuple[int, Task]] = {}
    keys: dict[Hashable, int] = {}
    refused: list[BaseModel] = []
    for place, job in enumerate(group.jobs):
        try:
            task = parse_task(job.task)
            waiting[place] = keys.setdefault(engine.batch_key(task), place), task
        except Exception as error:  # of this job alone
            refused.append(_failed(error, task_type, 0.0, place=place))
    send_all(pipe, refused)
    size = max(1, min(engine.batch_size, group.most))
    while waiting:
        aborts.read()
        if stopped := aborts.places & waiting.keys():
            for place in stopped:
                del waiting[place]
            send_all(pipe, [Aborted(place=place) for place in stopped])
            continue
        first, _ = next(iter(waiting.values()))
        places = [place for place, (key, _) in waiting.items() if key == first][:size]
        send(pipe, BatchBegun(places=tuple(places)))
        limit = min(group.jobs[place].time_limit for place in places)
        batch = [
            (place, waiting.pop(place)[1], _context(place, group.jobs[place], limit, pipe, aborts))
            for place in places
        ]
        if len(batch) == 1:
            answers: Sequence[BaseModel] = [_compute_alone(engine, task_type, *batch[0])]
        else:
            answers = _compute_batch(engine, task_type, batch, aborts)
        flush_output()
        send_all(pipe, answers)


def _compute_alone(
    engine: Engine[Any], task_type: TaskType, place: int, task: Task | InvalidTask, context: Context
) -> Done | Failed | Aborted:
    began = time.monotonic()
    try:
        if isinstance(task, InvalidTask):
            raise task
        output = engine.run(task, context)
        return _done(task_type, output, context, time.monotonic() - began, place=place)
    except TaskAborted:
        return Aborted(place=place)
    except Exception as error:
        return _failed(error, task_type, time.monotonic() - began, place=place)


def _compute_batch(
    engine: Engine[Any], task_type: TaskType, batch: Sequence[tuple[int, Task, Context]], aborts: _Aborts
) -> Sequence[Done | Failed | Aborted | Alone]:
    places, tasks, contexts = zip(*batch, strict=True)
    size, began = len(batch), time.monotonic()
    try:
        outputs = engine.run_batch(tasks, contexts)
        if len(outputs) != size:
            raise ValueError(f"run_batch returned {len(outputs)} outputs for {size} tasks")
    except TaskAborted:
        message = "the batch was stopped for another of its jobs"
        return [
            Aborted(place=place)
            if place in aborts.places
            else Alone(place=place, reason="raised", message=message)
            for place in places
        ]
    except Exception as error:
        if isinstance(error, InferqError):  # its text may quote a task
            message = f"run_batch raised {type(error).__name__} ({error.code})"
            _log.warning("a batch of %d tasks failed in engine %s: %s", size, task_type.engine, message)
        else:
            what = f"a batch of {size} tasks failed in engine {task_type.engine}"
            message = report_incident(_log, what, error)
        reason = "out_of_memory" if out_of_memory(error) else "raised"
        return [Alone(place=place, reason=reason, message=message) for place in places]
    seconds = time.monotonic() - began
    return [
        _answer(task_type, output, context, seconds, place=place, batch_size=size)
        for place, output, context in zip(places, outputs, contexts, strict=True)
    ]


def _context(place: int, job: Run | Job, time_limit: float, pipe: Channel, aborts: _Aborts) -> Context:
    return Context(
        folder=Path(job.scratch),
        inputs={
            name: InputFile(note.path, note.bytes, note.content_type) for name, note in job.inputs.items()
        },
        report=_Reporter(pipe, place),
        abort_requested=partial(aborts.asked, place),
        time_limit=time_limit,
    )


def _answer(
    task_type: TaskType,
    output: BaseModel | Mapping[str, Any] | Exception,
    context: Context,
    seconds: float,
    *,
    place: int,
    batch_size: int,
) -> Done | Failed | Aborted:
    """The answer for one task of a batch."""
    if isinstance(output, TaskAborted):
        return Aborted(place=place)
    if isinstance(output, Exception):
        failed = _failed(output, task_type, seconds, place=place, batch_size=batch_size)
        output.__traceback__ = None  # its frames hold the batch's tensors
        return failed
    try:
        return _done(task_type, output, context, seconds, place=place, batch_size=batch_size)
    except Exception as error:
        return _failed(error, task_type, seconds, place=place, batch_size=batch_size)


def _failed(
    error: Exception, task_type: TaskType, seconds: float, *, place: int = 0, batch_size: int = 1
) -> Failed:
    memory = out_of_memory(error)
    if isinstance(error, InvalidTask | TransientFailure):
        code, message = error.code, error.message
    else:
        code = "out_of_memory" if memory else "engine_error"
        message = report_incident(_log, f"a task failed in engine {task_type.engine}", error)
    return Failed(
        place=place,
        batch_size=batch_size,
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
    task_type: TaskType,
    output: BaseModel | Mapping[str, Any],
    context: Context,
    seconds: float,
    *,
    place: int,
    batch_size: int = 1,
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
    return Done(place=place, batch_size=batch_size, output=inline, artifacts=artifacts, seconds=seconds)


class _Reporter:
    """Sends a job's progress to the worker, at most once in _PROGRESS_SECONDS, and never backwards."""

    def __init__(self, pipe: Channel, place: int) -> None:
        self._pipe = pipe
        self._place = place
        self._last_time = 0.0
        self._furthest = 0.0

    def __call__(self, fraction: float, note: str) -> None:
        self._furthest = max(self._furthest, fraction)
        now = time.monotonic()
        if now - self._last_time >= _PROGRESS_SECONDS:
            self._last_time = now
            send(self._pipe, Progress(place=self._place, fraction=self._furthest, note=note[:200]))


class _Aborts:
    """The places of the jobs that the worker asked to stop. Reads the pipe only when somebody asks."""

    def __init__(self, pipe: Channel) -> None:
        self._pipe = pipe
        self.places: set[int] = set()

    def asked(self, place: int) -> bool:
        """Whether the worker asked this job to stop."""
        if place not in self.places:
            self.read()
        return place in self.places

    def read(self) -> None:
        """Take the requests that have come."""
        while self._pipe.poll(0):
            if isinstance(message := from_worker(self._pipe), Abort):
                self.places.update(message.places)
