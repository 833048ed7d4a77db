"""The settings of the NER engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferq.engine import EngineSettings


class NerSettings(EngineSettings):
    """Which model looks, on what, and how much one input may ask of it."""

    ner_backend: Literal["lac", "paddlenlp"] = Field(
        "lac", description="What finds entities: `lac` (weights in jieba's package, CPU) or `paddlenlp`."
    )
    ner_device: Literal["cpu", "gpu"] | None = Field(
        None, description="What NER computes on, where it differs from INFERQ_DEVICE: the `cpu` or the `gpu`."
    )
    ner_mode: Literal["fast", "accurate"] = Field(
        "accurate", description="PaddleNLP's model: `fast` (LAC) or `accurate` (WordTag)."
    )
    ner_model_dir: Path | None = Field(
        None,
        description="The folder of weights of PaddleNLP's mode, or `weights:NAME` of the weights' manifest. "
        "Without it, PaddleNLP uses its own cache, "
        "and downloads.",
    )
    ner_batch_size: int = Field(
        64, ge=1, le=4096, description="Sentences that NER computes together; more cost memory in proportion."
    )
    ner_max_characters: int = Field(
        100_000, ge=1, description="The longest text that NER takes, in characters; longer ones are refused."
    )
