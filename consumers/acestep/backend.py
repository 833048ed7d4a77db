"""The protocol that music backends implement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inferq.consumers.acestep import AceStepTask
from inferq.engine import Context
from inferq.schemas import EngineInfo

SAMPLE_RATE = 48_000
"""Frames per second. A frame is one sample of each channel."""

CHANNELS = 2

Audio = NDArray[np.float32]
"""Stereo audio: `(frames, 2) float32`, full scale is -1 to 1."""


class Backend(Protocol):
    """A loaded music backend."""

    info: EngineInfo
    ai: bool
    """Whether an AI model makes the music."""

    def compose(self, task: AceStepTask, seed: int, context: Context) -> Iterator[Audio]:
        """The music in blocks of any size, `frames_of(task.duration)` frames in all, below full scale.

        The same task and seed give the same audio. Reports progress. Raises inferq.engine.TaskAborted if the
        run has to stop, and inferq.schemas.TransientFailure if the model's output is not valid audio.
        """


def frames_of(duration: float) -> int:
    """The number of frames in `duration` seconds, rounded."""
    return round(duration * SAMPLE_RATE)
