"""acestep: generates music from a description, and sings lyrics if the model can.

engine    a description in, audio and its waveform out, with any of the backends
backend   the protocol of music backends
pipeline  the ACE-Step model
preview   a small synthesizer without AI
plan      tempo, key, mood and instruments from a prompt
score     the preview's chords, bass, melody and drums
voices    the preview's instruments
mixer     renders notes as stereo audio
audio     writes audio files, and measures their peak
waveform  draws the waveform of a piece
settings  the settings of the music engine
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from inferq.consumers.acestep.settings import AceStepSettings
from inferq.schemas import Options, Task, TaskType

AudioFormat = Literal["wav", "flac", "mp3"]

Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=5, max_length=2000),
    # White space around it does not count.
    Field(json_schema_extra={"pattern": r"\S[\s\S]{3,}\S"}),
]
Lyrics = Annotated[str, StringConstraints(strip_whitespace=True, max_length=4096)]


class AceStepOptions(Options):
    """The model's parameters and the audio file's format."""

    steps: int | None = Field(
        None,
        ge=1,
        le=100,
        description="The number of the model's denoising steps; the default is 8 for turbo weights, else 50. The "
        "preview ignores it.",
    )
    guidance: float | None = Field(
        None,
        ge=1,
        le=20,
        description="Guidance scale: how closely the model follows the prompt. 1 turns guidance off; the default "
        "is 7. Turbo weights have guidance built in and ignore this, as does the preview.",
    )
    format: AudioFormat = Field(
        "wav", description="The audio format: `wav` or `flac` with 16 bits, or `mp3` in its highest quality."
    )
    reuse: bool = Field(
        False,
        description="Whether a task without a seed may get the music of an equal task from the result cache. It "
        "needs workers with `INFERQ_RESULT_CACHE`.",
    )


class AceStepTask(Task):
    """Generates a piece of music of a given length."""

    task_type: Literal["acestep"]
    prompt: Prompt = Field(
        description="A description of the music: style, mood, instruments, tempo, key.",
        examples=["calm piano and strings, slow, in A minor"],
    )
    duration: float = Field(30.0, ge=1, le=600, description="The exact length of the music in seconds.")
    lyrics: Lyrics | None = Field(
        None, description="The lyrics, with tags such as `[verse]` and `[chorus]`. The preview does not sing."
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=2**32 - 1,
        description="The same seed gives the same music. Without one, a random seed is drawn; the output holds it.",
    )
    options: AceStepOptions = AceStepOptions()


class AceStepOutput(BaseModel):
    """Facts about the music. The artifacts are `audio.wav`, `.flac` or `.mp3`, and `waveform.png`."""

    model_config = ConfigDict(frozen=True)

    duration: float = Field(gt=0, description="Seconds: samples per channel divided by `sample_rate`.")
    sample_rate: int = Field(description="Samples per second and channel.")
    channels: int
    peak_dbfs: float = Field(
        lt=0, description="The loudest sample, in decibels below full scale, before MP3 encoding."
    )
    seed: int = Field(description="The seed. A task with this seed generates the same music again.")
    preview: bool = Field(description="Whether the preview, a simple synthesizer, made the music.")
    ai: bool = Field(description="Whether an AI model made the music.")


def _may_be_reused(task: Task) -> bool:
    # Without a seed, each run draws one, so its output differs.
    return isinstance(task, AceStepTask) and (task.seed is not None or task.options.reuse)


task_type = TaskType(
    name="acestep",
    task=AceStepTask,
    output=AceStepOutput,
    engine="inferq.consumers.acestep.engine:AceStepEngine",
    arguments=("prompt",),
    # A GPU generates ten minutes of music in well under a minute. A CPU is too slow to be useful.
    time_limit=1800.0,
    cacheable=_may_be_reused,
    summary="generates music from a description",
    settings=AceStepSettings,
)
