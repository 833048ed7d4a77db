"""acestep: makes music from a description, and sings lyrics where the model can."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from inferq.consumers.acestep.settings import AceStepSettings
from inferq.schemas import Options, Task, TaskType

AudioFormat = Literal["wav", "flac", "mp3"]

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=5, max_length=2000)]
Lyrics = Annotated[str, StringConstraints(strip_whitespace=True, max_length=4096)]


class AceStepOptions(Options):
    """How to compute it, and what file to leave."""

    steps: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Denoising steps of the model; the default is the model's: 8 for turbo weights, else 50. "
        "The preview has none.",
    )
    guidance: float | None = Field(
        None,
        ge=1,
        le=20,
        description="How closely the model follows the prompt; 1 is none, the default 7. Turbo weights have "
        "it built in and, like the preview, pass over it.",
    )
    format: AudioFormat = Field(
        "wav", description="The audio file: `wav` or `flac` with 16 bits, or `mp3` of the best quality."
    )


class AceStepTask(Task):
    """Makes a piece of music of a given length."""

    task_type: Literal["acestep"]
    prompt: Prompt = Field(
        description="What it should sound like: style, mood, instruments, tempo, key.",
        examples=["calm piano and strings, slow, in A minor"],
    )
    duration: float = Field(30.0, ge=1, le=600, description="Seconds; the file has exactly so many.")
    lyrics: Lyrics | None = Field(
        None, description="What is sung, with tags such as `[verse]` and `[chorus]`. The preview cannot sing."
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=2**32 - 1,
        description="The same seed gives the same music. Where none is given one is drawn, and the output "
        "tells which.",
    )
    options: AceStepOptions = AceStepOptions()


class AceStepOutput(BaseModel):
    """What was made. The music is the artifact `audio.wav`, `.flac` or `.mp3`; `waveform.png` shows it."""

    model_config = ConfigDict(frozen=True)

    duration: float = Field(gt=0, description="Seconds: samples divided by `sample_rate`.")
    sample_rate: int = Field(description="Samples a second and channel.")
    channels: int
    peak_dbfs: float = Field(
        lt=0, description="The loudest sample, in decibels below full scale, before MP3 encoding."
    )
    seed: int = Field(description="The seed that it was made with: given again, it makes the same.")
    preview: bool = Field(description="Whether a simple synthesizer stood in for the model.")
    ai: bool = Field(description="Whether a model made the music.")


task_type = TaskType(
    name="acestep",
    task=AceStepTask,
    output=AceStepOutput,
    engine="inferq.consumers.acestep.engine:AceStepEngine",
    arguments=("prompt",),
    # Ten minutes of music take a GPU well under a minute, a CPU far longer than anybody waits.
    time_limit=1800.0,
    # Where no seed is given each run draws one.
    cacheable=lambda task: isinstance(task, AceStepTask) and task.seed is not None,
    summary="makes music from a description",
    settings=AceStepSettings,
)
