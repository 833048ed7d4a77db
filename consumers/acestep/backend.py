"""What makes the music must do this for us, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inferq.consumers.acestep import AceStepTask
from inferq.engine import Context
from inferq.schemas import EngineInfo

SAMPLE_RATE = 48_000
"""Frames a second. A frame is one sample of each channel."""

CHANNELS = 2

Audio = NDArray[np.float32]
"""Stereo sound: `(frames, 2) float32`, full scale is -1 to 1."""


class Backend(Protocol):
    """Something that makes music, ready to."""

    info: EngineInfo
    ai: bool
    """Whether a model makes the music."""

    def compose(self, task: AceStepTask, seed: int, context: Context) -> Iterator[Audio]:
        """The music in blocks of any size, `frames_of(task.duration)` frames in all, below full scale.

        The same task and seed give the same sound. Reports progress, and stops where it is asked to.
        Raises inferq.schemas.TransientFailure where what was computed is no sound.
        """


def frames_of(duration: float) -> int:
    """The frames in `duration` seconds, to the nearest."""
    return round(duration * SAMPLE_RATE)
