"""The protocol that music backends implement."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
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

    batch_size: int
    """The most tasks that one `compose` takes."""

    def batch_key(self, task: AceStepTask) -> Hashable:
        """The tasks with equal keys go together in one `compose`."""

    def compose(
        self, tasks: Sequence[AceStepTask], seeds: Sequence[int], contexts: Sequence[Context]
    ) -> Sequence[Iterator[Audio]]:
        """Each task's music in blocks of any size, `frames_of(task.duration)` frames in all, below full scale.

        The same task and seed give the same audio, whatever the other tasks are. Reports progress. Raises
        inferq.engine.TaskAborted if all runs have to stop, and inferq.schemas.TransientFailure if the model's output
        is not valid audio; so do the iterators, for one task.
        """


def frames_of(duration: float) -> int:
    """The number of frames in `duration` seconds, rounded."""
    return round(duration * SAMPLE_RATE)
