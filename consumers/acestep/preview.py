"""The preview: a small synthesizer that plays a piece in the mood of the prompt, without AI and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from inferq.consumers.acestep import AceStepTask
from inferq.consumers.acestep.backend import SAMPLE_RATE, Audio, frames_of
from inferq.consumers.acestep.mixer import mix
from inferq.consumers.acestep.plan import read_prompt
from inferq.consumers.acestep.score import write_score
from inferq.engine import Context
from inferq.schemas import EngineInfo

_LONGEST_FADE = 4.0
"""The length of the fade-out at the end, in seconds."""


class PreviewBackend:
    """Plans a piece from the prompt, writes its score and plays it, in 1/50 of the piece's duration."""

    ai = False
    batch_size = 1

    def __init__(self) -> None:
        self.info = EngineInfo(name="preview", version="1", model="none", device="cpu", precision="fp32")

    def batch_key(self, task: AceStepTask) -> Hashable:  # noqa: ARG002
        """All pieces are alike: each is made as its blocks are asked for."""
        return None

    def compose(
        self, tasks: Sequence[AceStepTask], seeds: Sequence[int], contexts: Sequence[Context]
    ) -> list[Iterator[Audio]]:
        """The piece for each prompt and seed. It ignores lyrics, steps and guidance."""
        return [self._play(*one) for one in zip(tasks, seeds, contexts, strict=True)]

    @staticmethod
    def _play(task: AceStepTask, seed: int, context: Context) -> Iterator[Audio]:
        frames = frames_of(task.duration)
        rng = np.random.default_rng([seed, *hashlib.sha256(task.prompt.encode()).digest()])
        score = write_score(read_prompt(task.prompt, rng), frames, rng)
        done = 0
        for block in mix(score, frames):
            context.check_abort()
            _fade(block, done, frames)
            done += len(block)
            yield block
            context.progress(done / frames, f"{done / SAMPLE_RATE:.0f} of {task.duration:.0f} s")


def _fade(block: Audio, begin: int, frames: int) -> None:
    """Fade out the last seconds of the piece; `block` starts at frame `begin` of `frames`."""
    fade = round(min(_LONGEST_FADE * SAMPLE_RATE, 0.3 * frames))
    position = np.arange(begin, begin + len(block)) - (frames - 1 - fade)
    if position[-1] > 0:
        curve = np.cos(np.clip(position / fade, 0, 1) * np.pi / 2) ** 2
        block *= curve[:, None].astype(np.float32)
