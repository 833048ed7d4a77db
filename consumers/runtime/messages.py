"""The messages between a worker and its engine process: JSON lines over a channel.

Inputs and outputs are files in the scratch folder; only their names, a small output and progress travel. The
output follows its line unquoted, so that it is serialized and parsed once only.
"""

from __future__ import annotations

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


class Abort(_Message):
    """Stop the run at the next opportunity."""

    kind: Literal["abort"] = "abort"


class Ready(_Message):
    """Loaded and warmed up."""

    kind: Literal["ready"] = "ready"
    engine: EngineInfo


class LoadFailed(_Message):
    """The engine cannot be loaded."""

    kind: Literal["unable"] = "unable"
    code: str
    message: str
    permanent: bool


class Progress(_Message):
    """How far the run is."""

    kind: Literal["progress"] = "progress"
    fraction: float
    note: str


class Done(_Message):
    """The run's output and the artifacts that it wrote; `seconds` is the time that the engine took.

    The output is JSON text, which neither side parses; None if it is an artifact.
    """

    kind: Literal["done"] = "done"
    output: bytes | None = Field(None, exclude=True)
    artifacts: dict[str, FileRef] = {}
    seconds: float


class Failed(_Message):
    """The run failed. `out_of_memory`: the machine's or a GPU's memory ran out, and may be fragmented now."""

    kind: Literal["failed"] = "failed"
    code: str
    message: str
    invalid: bool
    out_of_memory: bool = False
    seconds: float


class Aborted(_Message):
    """The run stopped because it was asked to."""

    kind: Literal["aborted"] = "aborted"


FromWorker = Annotated[Prepare | Run | Abort, Field(discriminator="kind")]
FromEngine = Annotated[Ready | LoadFailed | Progress | Done | Failed | Aborted, Field(discriminator="kind")]

_from_worker: TypeAdapter[Prepare | Run | Abort] = TypeAdapter(FromWorker)
_from_engine: TypeAdapter[Ready | LoadFailed | Progress | Done | Failed | Aborted] = TypeAdapter(FromEngine)


def send(pipe: Channel, message: BaseModel, timeout: float | None = None) -> None:
    """Send a message. Raises OSError if the other process is gone, TimeoutError if it does not read in time."""
    line = to_json(message).encode()  # an engine's message may hold lone surrogates
    if isinstance(message, Done) and message.output is not None:
        line += b"\n" + message.output
    pipe.send(line, timeout)


def from_worker(pipe: Channel) -> Prepare | Run | Abort:
    """The next message of the worker; waits for it. Raises EOFError if the worker is gone."""
    return _from_worker.validate_json(pipe.receive())


def from_engine(pipe: Channel) -> Ready | LoadFailed | Progress | Done | Failed | Aborted:
    """The message of the engine process that has come: see `Channel.poll`.

    Raises EOFError if the process is gone, Unreadable if it sent something else, TimeoutError if nothing came.
    """
    line, newline, output = pipe.receive(0).partition(b"\n")
    try:
        message = _from_engine.validate_json(line)
    except ValidationError as error:
        raise Unreadable(f"it sent {len(line)} bytes that are no message") from error
    return message.model_copy(update={"output": output}) if newline else message
