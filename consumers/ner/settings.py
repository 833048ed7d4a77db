"""The settings of the NER engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class NerSettings(EngineSettings):
    """The NER model, its device, and the limits for one input."""

    ner_backend: Literal["lac", "paddlenlp"] = Field(
        "lac", description="The NER library: `lac` (weights in jieba's package, CPU only) or `paddlenlp`."
    )
    ner_device: Literal["cpu", "gpu"] | None = Field(
        None, description="The device for NER, if it differs from INFERQ_DEVICE: `cpu` or `gpu`."
    )
    ner_mode: Literal["fast", "accurate"] = Field(
        "accurate", description="PaddleNLP's model: `fast` (LAC) or `accurate` (WordTag)."
    )
    ner_model_dir: Path | None = Field(
        None,
        description="The folder with the weights for PaddleNLP's mode, or `weights:NAME` for an entry of the "
        "weights' manifest. Without this setting, PaddleNLP uses its own cache and downloads missing models.",
    )
    ner_batch_size: int = Field(
        64,
        ge=1,
        le=4096,
        description="The number of sentences that NER computes together, and the most tasks of a batch; memory grows "
        "in proportion.",
    )
    ner_max_characters: int = Field(
        100_000,
        ge=1,
        description="The longest text of an NER task, in characters; tasks with longer texts are refused.",
    )

    @property
    def gpu(self) -> int | None:
        if self.ner_device == "cpu":
            return None
        return 0 if self.ner_device == "gpu" and super().gpu is None else super().gpu
