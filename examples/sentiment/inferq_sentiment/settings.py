"""The settings of the sentiment engine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from inferq.engine import Settings


class SentimentSettings(Settings):
    """What the engine knows."""

    sentiment_lexicon: Path | None = Field(
        None,
        description="A UTF-8 file with words to add to those that the sentiment engine knows, one in a row: "
        "`+ cosy` or `- 无聊`.",
    )
