"""The sentences with their entities, and how well a backend finds them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).with_name("gold.txt")
TYPES = ("PER", "LOC", "ORG", "TIME")

Mention = tuple[str, int, int]
"""Type, start, end."""

_MARK = re.compile(r"\[([A-Z]+):([^\]]+)\]")


@dataclass(frozen=True)
class Sentence:
    """A sentence and what stands in it."""

    text: str
    entities: frozenset[Mention]

    @classmethod
    def parse(cls, line: str) -> Sentence:
        text, entities, position = "", set(), 0
        for mark in _MARK.finditer(line):
            text += line[position : mark.start()]
            entities.add((mark[1], len(text), len(text) + len(mark[2])))
            text += mark[2]
            position = mark.end()
        return cls(text + line[position:], frozenset(entities))


def sentences() -> list[Sentence]:
    lines = FILE.read_text("utf-8").splitlines()
    return [Sentence.parse(line) for line in lines if line and not line.startswith("#")]


@dataclass
class Score:
    """Counts of entities found rightly, found wrongly, and missed, by type; and where that was."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def precision(self, *types: str) -> float:
        right = sum(self.right[kind] for kind in types)
        return right / max(1, right + sum(self.wrong[kind] for kind in types))

    def recall(self, *types: str) -> float:
        right = sum(self.right[kind] for kind in types)
        return right / max(1, right + sum(self.missed[kind] for kind in types))


def score(gold: Sequence[Sentence], found: Sequence[set[Mention]]) -> Score:
    """An entity counts as found where its type and both ends are right; other types are left out."""
    result = Score()
    for sentence, all_mentions in zip(gold, found, strict=True):
        mentions = {mention for mention in all_mentions if mention[0] in TYPES}
        result.right.update(kind for kind, _, _ in mentions & sentence.entities)
        result.wrong.update(kind for kind, _, _ in mentions - sentence.entities)
        result.missed.update(kind for kind, _, _ in sentence.entities - mentions)
        if mentions != sentence.entities:
            missed = ", ".join(_show(sentence.text, sentence.entities - mentions)) or "nothing"
            wrong = ", ".join(_show(sentence.text, mentions - sentence.entities)) or "nothing"
            result.faults.append(f"{sentence.text} missed {missed}; wrong {wrong}")
    return result


def _show(text: str, mentions: set[Mention] | frozenset[Mention]) -> Iterator[str]:
    for kind, start, end in sorted(mentions, key=lambda mention: mention[1]):
        yield f"{kind} {text[start:end]}"
