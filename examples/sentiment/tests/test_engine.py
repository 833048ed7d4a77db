"""What the engine makes of a text. A toy, but what it does it does on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inferq.engine import InstallationError
from inferq.testing import Bench, Sample, Subject
from inferq_sentiment import SentimentOutput, task_type


@contextmanager
def judged(text: str, **options: float) -> Iterator[SentimentOutput]:
    sample = Sample({"text": text, "options": dict(options)})
    with Bench(Subject(task_type, [sample])).run(sample) as run:
        assert isinstance(run.output, SentimentOutput)
        yield run.output


@pytest.mark.parametrize(
    ("text", "label", "score", "words"),
    [
        ("I love it", "positive", 1.0, 1),
        ("I LOVED it", "positive", 1.0, 1),
        ("It isn't good.", "negative", -1.0, 1),
        ("I don’t hate it", "positive", 1.0, 1),
        ("Not bad, good!", "positive", 1.0, 2),
        ("Great food; slow, rude service", "negative", -1 / 3, 3),
        ("Great food, slow service", "neutral", 0.0, 2),
        ("The table has four legs", "neutral", 0.0, 0),
        ("glove, hatefulness", "neutral", 0.0, 0),
        ("这家餐厅不错，服务员很热情", "positive", 1.0, 2),
        ("一点都不好吃，太失望了", "negative", -1.0, 2),
        ("没有不满意", "positive", 1.0, 1),
        ("菜很 nice，可是太贵、太吵", "negative", -1 / 3, 3),
    ],
)
def test_texts(text: str, label: str, score: float, words: int) -> None:
    with judged(text) as output:
        assert (output.label, output.words) == (label, words)
        assert output.score == pytest.approx(score)


def test_what_is_neutral_is_an_option() -> None:
    with judged("Great food; slow, rude service", neutral_below=0.5) as output:
        assert output.label == "neutral"


def test_words_are_added_by_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("+ Cosy\n\n- 山寨\n", "utf-8")
    monkeypatch.setenv("INFERQ_SENTIMENT_LEXICON", str(lexicon))
    with judged("so cosy") as output:
        assert output.label == "positive"
    with judged("都是山寨货") as output:
        assert output.label == "negative"


@pytest.mark.parametrize("row", [b"cosy", b"+", b"+ two words", b"\xff"])
def test_a_lexicon_that_cannot_be_used_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes
) -> None:
    lexicon = tmp_path / "words.txt"
    lexicon.write_bytes(b"+ cosy\n" + row)
    monkeypatch.setenv("INFERQ_SENTIMENT_LEXICON", str(lexicon))
    with pytest.raises(InstallationError, match=r"INFERQ_SENTIMENT_LEXICON=.*words\.txt"):
        with judged("fine"):
            pass
