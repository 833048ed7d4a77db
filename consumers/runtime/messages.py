"""The messages between a worker and its engine process: JSON lines over a channel.

Inputs and outputs are files in the scratch folder; only their names, a small output and progress travel. The
output follows its line unquoted, so that it is serialized and parsed once only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from inferq.consumers.runtime.channel import Channel, Unreadable
from inferq.schemas import EngineInfo
from inferq.schemas.encoding import to_json

INLINE_OUTPUT_BYTES = 256 * 1024
"""The largest output (as JSON) that travels inline; a larger one becomes the artifact `output.json`."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class FileRef(_Message):
    """A file in the scratch folder."""

    path: Path
    content_type: str
    bytes: int = 0
    sha256: str | None = Field(None, exclude=True)


class Prepare(_Message):
    """The task that is likely to run next: the engine process parses it while the worker decides."""

    kind: Literal["prepare"] = "prepare"
    task: str


class Run(_Message):
    """Compute this task, or the prepared one if it is None."""

    kind: Literal["run"] = "run"
    task: str | None
    scratch: str
    inputs: dict[str, FileRef] = {}
    time_limit: float = 300.0


@dataclass(frozen=True)
class Job:
    """A task (its JSON) of a group, with its scratch folder, its inputs, and its time limit in seconds."""

    task: str
    scratch: str
    inputs: Mapping[str, FileRef] = field(default_factory=dict)
    time_limit: float = 300.0


class RunGroup(_Message):
    """Compute these tasks, in batches of at most `most`. A job's place is its position in `jobs`."""

    kind: Literal["group"] = "group"
    jobs: tuple[Job, ...]
    most: int


class Abort(_Message):
    """Stop the run, or the jobs of a group at these places, at the next opportunity."""

    kind: Literal["abort"] = "abort"
    places: tuple[int, ...] = (0,)


class Ready(_Message):
    """Loaded and warmed up. `batch_size`: the most tasks that the engine computes together."""

    kind: Literal["ready"] = "ready"
    engine: EngineInfo
    batch_size: int = 1


class BatchBegun(_Message):
    """The engine now computes the jobs of a group at these places, together."""

    kind: Literal["begun"] = "begun"
    places: tuple[int, ...]


class LoadFailed(_Message):
    """The engine cannot be loaded."""

    kind: Literal["unable"] = "unable"
    code: str
    message: str
    permanent: bool


class Progress(_Message):
    """How far the run is. `place`: the job's place in its group."""

    kind: Literal["progress"] = "progress"
    place: int = 0
    fraction: float
    note: str


class Done(_Message):
    """The run's output and the artifacts that it wrote; `seconds` is the time that the engine took.

    The output is JSON text, which neither side parses; None if it is an artifact. `place`: the job's place in its
    group. `batch_size`: how many jobs the engine computed together; `seconds` is the time for all of them.
    """

    kind: Literal["done"] = "done"
    place: int = 0
    batch_size: int = 1
    output: bytes | None = Field(None, exclude=True)
    artifacts: dict[str, FileRef] = {}
    seconds: float


class Failed(_Message):
    """The run failed. `out_of_memory`: the machine's or a GPU's memory ran out, and may be fragmented now.

    `place`, `batch_size` and `seconds` as in Done.
    """

    kind: Literal["failed"] = "failed"
    place: int = 0
    batch_size: int = 1
    code: str
    message: str
    invalid: bool
    out_of_memory: bool = False
    seconds: float


class Aborted(_Message):
    """The run stopped because it was asked to, or the job was left out of its batch."""

    kind: Literal["aborted"] = "aborted"
    place: int = 0


class Alone(_Message):
    """The batch failed as a whole: compute this job alone. The batch costs it no attempt."""

    kind: Literal["alone"] = "alone"
    place: int = 0
    reason: Literal["engine_died", "time_limit", "out_of_memory", "raised"]
    message: str


_WorkerMessage = Prepare | Run | RunGroup | Abort
_EngineMessage = Ready | LoadFailed | BatchBegun | Progress | Done | Failed | Aborted | Alone

FromWorker = Annotated[_WorkerMessage, Field(discriminator="kind")]
FromEngine = Annotated[_EngineMessage, Field(discriminator="kind")]

_from_worker: TypeAdapter[_WorkerMessage] = TypeAdapter(FromWorker)
_from_engine: TypeAdapter[_EngineMessage] = TypeAdapter(FromEngine)


def send(pipe: Channel, message: BaseModel, timeout: float | None = None) -> None:
    """Send a message. Raises OSError if the other process is gone, TimeoutError if it does not read in time."""
    pipe.send(_line(message), timeout)


def send_all(pipe: Channel, messages: Iterable[BaseModel]) -> None:
    """Send messages at once: the other process wakes once for all of them. Raises OSError if it is gone."""
    pipe.send_all(map(_line, messages))


def _line(message: BaseModel) -> bytes:
    line = to_json(message).encode()  # an engine's message may hold lone surrogates
    if isinstance(message, Done) and message.output is not None:
        line += b"\n" + message.output
    return line


def from_worker(pipe: Channel) -> _WorkerMessage:
    """The next message of the worker; waits for it. Raises EOFError if the worker is gone."""
    return _from_worker.validate_json(pipe.receive())


def from_engine(pipe: Channel) -> _EngineMessage:
    """The message of the engine process that has come: see `Channel.poll`.

    Raises EOFError if the process is gone, Unreadable if it sent something else, TimeoutError if nothing came.
    """
    line, newline, output = pipe.receive(0).partition(b"\n")
    try:
        message = _from_engine.validate_json(line)
    except ValidationError as error:
        raise Unreadable(f"it sent {len(line)} bytes that are no message") from error
    return message.model_copy(update={"output": output}) if newline else message
