"""sentiment: whether a text is positive, negative or neutral. Describes the type; imports no engine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from inferq.engine import Options, Task, TaskType
from inferq_sentiment.settings import SentimentSettings


class SentimentOptions(Options):
    """How to judge."""

    neutral_below: float = Field(
        0.2, ge=0, le=1, description="A text whose score is nearer to 0 than this is neutral."
    )


class SentimentTask(Task):
    """Judges a text in English, in Chinese, or in both."""

    task_type: Literal["sentiment"]
    text: str = Field(min_length=1, max_length=20_000)
    options: SentimentOptions = SentimentOptions()


class SentimentOutput(BaseModel):
    """The judgement, and what it rests on."""

    label: Literal["positive", "negative", "neutral"]
    score: float = Field(ge=-1, le=1, description="From -1 (negative) to 1 (positive).")
    words: int = Field(ge=0, description="How many words of the text the engine has an opinion on.")


task_type = TaskType(
    name="sentiment",
    task=SentimentTask,
    output=SentimentOutput,
    engine="inferq_sentiment.engine:SentimentEngine",
    arguments=("text",),
    time_limit=60,
    summary="tells whether a text is positive, negative or neutral",
    settings=SentimentSettings,
)
