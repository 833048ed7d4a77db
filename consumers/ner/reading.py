"""The text as a model should read it: without markup, and with names whole that a line's end breaks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise

from inferq.consumers.ner.backend import Span

_BLOCKS = (
    "address|article|aside|blockquote|body|br|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|head|header|"
    "hr|html|li|main|nav|ol|option|p|pre|section|table|tbody|td|tfoot|th|thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|b|bdi|bdo|big|button|center|cite|code|del|dfn|em|font|i|iframe|img|input|ins|kbd|label|link|mark|meta|"
    "nobr|q|rp|rt|ruby|s|samp|select|small|span|strike|strong|sub|sup|textarea|time|tt|u|var|video|wbr"
)
# Each part has a bound, or a text of many opened comments would take the square of its length.
_MARKUP = re.compile(
    r"<!--.{0,5000}?-->|<!doctype[^<>]{0,200}>|<(?P<skipped>script|style)\b[^<>]{0,2000}>.{0,5000}?</(?P=skipped)\s*>"
    rf"|</?(?:(?P<block>{_BLOCKS})|{_INLINE})(?:\s[^<>]{{0,2000}})?/?>",
    re.IGNORECASE | re.DOTALL,
)

_LINE = re.compile(r"[^\n]*\n?")
_LEAST_WRAPPED = 8
"""A line of fewer characters is not taken for a wrapped one: it may be a name or a value in a list."""
_FULL = 0.75
"""The share of its paragraph's longest line that a wrapped line has at least."""

_ISO_DATE = re.compile(
    r"(?<![\w.\-/])(?P<date>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?:[01]\d|2[0-4]):[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?(?:Z|[+-]\d\d(?::?\d\d)?)?)?(?![\w\-/]|[.:]\d)",
    re.ASCII,
)


@dataclass(frozen=True)
class Reading:
    """A text without the characters that a model should not see; `places` has the place of each one that is left."""

    text: str
    places: Sequence[int]

    def original(self, span: Span) -> Span:
        """The span in the original text."""
        if isinstance(self.places, range):  # nothing was left out
            return span
        return replace(span, start=self.places[span.start], end=self.places[span.end - 1] + 1)


def reading(text: str) -> Reading:
    """The text without HTML tags, and without line ends that break a Chinese or Japanese sentence.

    A tag that ends a paragraph becomes a line end, so that the text before it and after it stay apart.
    """
    characters: list[str] | None = None
    for tag in _MARKUP.finditer(text) if "<" in text else ():
        characters = characters or list(text)
        gap = "\n" if tag["block"] or tag["skipped"] else ""
        characters[tag.start() : tag.end()] = [gap, *[""] * (len(tag[0]) - 1)]
    for place in _wrapped(text) if "\n" in text else ():
        characters = characters or list(text)
        characters[place] = ""
    if characters is None:
        return Reading(text, range(len(text)))
    places = [place for place, character in enumerate(characters) if character]
    return Reading("".join(characters), places)


def iso_dates(text: str) -> list[Span]:
    """The dates and times in the form of ISO 8601, such as 2023-05-01T10:30Z, which the models do not know."""
    return [
        Span(found.start(), found.end(), "TIME", source="pattern")
        for found in _ISO_DATE.finditer(text)
        if _is_date(found["date"])
    ]


def _wrapped(text: str) -> list[int]:
    """The places of the characters between lines that one sentence fills: line ends and white space beside them."""
    found: list[int] = []
    paragraph: list[tuple[int, str]] = []
    for match in _LINE.finditer(text):
        if match[0].strip():
            paragraph.append((match.start(), match[0]))
        else:
            found.extend(_breaks(paragraph))
            paragraph = []
    return found


def _breaks(paragraph: list[tuple[int, str]]) -> list[int]:
    if len(paragraph) < 2:
        return []
    longest = max(len(line.strip()) for _, line in paragraph)
    found: list[int] = []
    for (start, line), (next_start, next_line) in pairwise(paragraph):
        full, begins = line.strip(), next_line.strip()
        if len(full) < max(_LEAST_WRAPPED, _FULL * longest):
            continue
        if next_line[0] == begins[0] and _unspaced(full[-1]) and _unspaced(begins[0]):
            found.extend(range(start + len(line.rstrip()), next_start))
    return found


def _unspaced(character: str) -> bool:
    """Whether it is a letter of a script without spaces between words, in which a line may end anywhere."""
    return character.isalpha() and unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
