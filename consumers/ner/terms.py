"""Finds a user's own terms in a text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence

from inferq.consumers.ner.backend import Span
from inferq.consumers.ner.folding import fold

_UNSPACED = ("THAI", "LAO", "TIBETAN", "MYANMAR", "KHMER")


class Dictionary:
    """Terms by type, indexed for search."""

    def __init__(self, terms: Mapping[str, Sequence[str]]) -> None:
        by_length: dict[int, dict[str, str]] = {}
        for kind, group in terms.items():
            for term in group:
                by_length.setdefault(len(term), {}).setdefault(fold(term), kind)
        self._by_length = [
            (length, known, {term[0] for term in known})
            for length, known in sorted(by_length.items(), reverse=True)
        ]

    def find(self, text: str, check_abort: Callable[[], None] = lambda: None) -> list[Span]:
        """The terms in a text, in order. Of overlapping matches the longest wins, then the first.

        The time grows with the text's length times the number of different term lengths. It calls
        `check_abort` once per term length.
        """
        folded = fold(text)
        taken = bytearray(len(text))
        found = []
        for length, terms, firsts in self._by_length:
            check_abort()
            for start, character in enumerate(folded):
                if character not in firsts:
                    continue
                end = start + length
                kind = terms.get(folded[start:end])
                if kind is None or any(taken[start:end]) or not _whole(folded, start, end):
                    continue
                taken[start:end] = b"\1" * length
                found.append(Span(start, end, kind, source="dictionary"))
        return sorted(found, key=lambda span: span.start)


def _whole(text: str, start: int, end: int) -> bool:
    """Whether a match is not part of a longer word or number, in a script with spaces between words."""
    return not (start > 0 and _in_word(text[start - 1], text[start])) and not (
        end < len(text) and _in_word(text[end - 1], text[end])
    )


def _in_word(left: str, right: str) -> bool:
    return _spaced(left) and _spaced(right)


def _spaced(character: str) -> bool:
    """Whether it is a letter, a digit or an accent of a script with spaces between words, such as Latin or Cyrillic.

    In Chinese, Japanese and Thai a word may begin anywhere; to a Korean one, particles are joined.
    """
    if character.isascii():
        return character.isalnum()
    return (
        unicodedata.category(character)[0] in "LMN"
        and unicodedata.east_asian_width(character) not in "WFH"
        and not unicodedata.name(character, "").startswith(_UNSPACED)
    )
