"""The sentiment engine: counts words. It is imported in the engine process only."""

from __future__ import annotations

from collections.abc import Sequence

from inferq.engine import Context, Engine, EngineInfo, InvalidTask
from inferq_sentiment import SentimentOutput, SentimentTask
from inferq_sentiment.lexicon import (
    built_in,
    clauses,
    is_readable,
    normalize,
    opinions,
    read_lexicon,
    tokenizer,
)
from inferq_sentiment.settings import SentimentSettings


class SentimentEngine(Engine[SentimentTask]):
    """Counts the positive and the negative words of a text. A toy: it understands neither irony nor context."""

    batch_size = 16

    def load(self) -> EngineInfo:
        """Read the words. Raises InstallationError if INFERQ_SENTIMENT_LEXICON cannot be used."""
        more = SentimentSettings.load().sentiment_lexicon
        self._weights = built_in() | (read_lexicon(more) if more else {})
        self._tokens = tokenizer(self._weights)
        return EngineInfo(name="lexicon", version="1", model=f"{len(self._weights)} words", device="cpu")

    def run(self, task: SentimentTask, context: Context) -> SentimentOutput:
        """Judge a text clause by clause."""
        text = normalize(task.text)
        if not is_readable(text):
            raise InvalidTask(
                "text holds neither Latin letters nor Chinese characters: send a text in English or Chinese",
                code="no_words",
            )
        found: list[int] = []
        parts = clauses(text)
        for done, clause in enumerate(parts):
            context.check_abort()  # stops here if the task is cancelled or over time
            context.progress(done / len(parts), f"clause {done + 1} of {len(parts)}")
            found += opinions(clause, self._weights, self._tokens)
        context.progress(1.0, "judged")
        score = sum(found) / len(found) if found else 0.0
        if not found or abs(score) < task.options.neutral_below:
            return SentimentOutput(label="neutral", score=score, words=len(found))
        return SentimentOutput(label="positive" if score > 0 else "negative", score=score, words=len(found))

    def run_batch(
        self, tasks: Sequence[SentimentTask], contexts: Sequence[Context]
    ) -> list[SentimentOutput | Exception]:
        """Judge several texts; one that cannot be judged fails alone. A model would take all of them in one call."""
        return [self._judge(task, context) for task, context in zip(tasks, contexts, strict=True)]

    def _judge(self, task: SentimentTask, context: Context) -> SentimentOutput | Exception:
        try:
            return self.run(task, context)
        except Exception as error:
            return error
