"""The words that the engine has an opinion on, and how it finds them in a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from inferq.engine import InstallationError

_POSITIVE = """
amazing awesome beautiful best better brilliant delicious delighted enjoy enjoyed excellent fantastic fast
fine friendly fun glad good great happy helpful impressed love loved lovely nice perfect pleasant pleased
reliable superb terrific useful wonderful
喜欢 高兴 开心 满意 优秀 精彩 漂亮 美丽 完美 好吃 好看 好用 好玩 棒 赞 不错 推荐
舒服 方便 值得 愉快 热情 感谢 好
"""
_NEGATIVE = """
angry annoying awful bad boring broken cold dirty disappointed disappointing disgusting dreadful fail failed
hate hated horrible mediocre noisy poor rude sad slow terrible ugly unhappy unreliable useless waste worse
worst wrong
讨厌 难过 失望 糟糕 难吃 难看 难用 无聊 垃圾 差劲 生气 愤怒 后悔 浪费 麻烦 可怕 恶心
脏 吵 慢 贵 差 坏
"""

NEGATIONS = frozenset({
    "not", "no", "never", "without", "hardly", "nor", "cannot", "不", "没", "没有", "无", "并非", "别",
})  # fmt: skip
"""Words that turn the next opinion of their clause around; so do those that end in n't."""

_LATIN_WORD = r"[^\W\d_\u3400-\u9fff]+(?:'[^\W\d_\u3400-\u9fff]+)?"
_HAN = re.compile(r"[\u3400-\u9fff]")

Weights = Mapping[str, int]
"""1 for a positive word, -1 for a negative one."""


def built_in() -> dict[str, int]:
    """The words above."""
    return dict.fromkeys(_POSITIVE.split(), 1) | dict.fromkeys(_NEGATIVE.split(), -1)


def read_lexicon(path: Path) -> dict[str, int]:
    """The words of a file with rows such as `+ cosy`.

    Raises InstallationError if the file cannot be read or a row has another form.
    """
    try:
        rows = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InstallationError(
            f"INFERQ_SENTIMENT_LEXICON={path} cannot be read: {error}", code="bad_lexicon"
        ) from error
    words = {}
    for number, row in enumerate(rows, 1):
        sign, _, word = row.strip().partition(" ")
        if not sign:
            continue
        if sign not in {"+", "-"} or len(word.split()) != 1:
            raise InstallationError(
                f"INFERQ_SENTIMENT_LEXICON={path}, row {number}: {row!r} is neither '+ word' nor '- word'",
                code="bad_lexicon",
            )
        words[normalize(word.strip())] = 1 if sign == "+" else -1
    return words


def normalize(text: str) -> str:
    """The text in one form of its characters, without capitals, with straight apostrophes."""
    return unicodedata.normalize("NFKC", text).casefold().replace("’", "'")


def tokenizer(words: Iterable[str]) -> re.Pattern[str]:
    """Finds Latin words, and in Chinese, which has no spaces, the longest of `words` that stands there."""
    chinese = sorted((word for word in {*words, *NEGATIONS} if _HAN.search(word)), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, chinese), _LATIN_WORD]))


def is_readable(text: str) -> bool:
    """Whether a text holds a Latin letter or a Chinese character at all."""
    return re.search(r"[a-z\u3400-\u9fff]", text) is not None


def clauses(text: str) -> list[str]:
    """The text cut at its punctuation."""
    return [part for part in re.split(r"[,.!?;:\n，。！？；：、]+", text) if part.strip()]


def opinions(clause: str, weights: Weights, tokens: re.Pattern[str]) -> Iterator[int]:
    """1 or -1 for each word of the clause that the weights know."""
    negated = False
    for token in tokens.findall(clause):
        if token in NEGATIONS or token.endswith("n't"):
            negated = not negated
        elif token in weights:
            yield -weights[token] if negated else weights[token]
            negated = False
