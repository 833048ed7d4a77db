"""Splits a text into pieces that fit a model's window: at ends of sentences, else at the next best place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_SENTENCE = re.compile(
    # Up to the end of a sentence, including its closing quotes and brackets, or to the end of the line.
    r"[^。！？!?…\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*"
    r"(?:[。！？!?…]+[”’」』）)】〕》]*|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+|\Z)"
)

_PLACES = ("；;", "，,：:", "、/|")
"""Where to cut a sentence that is too long: after the last mark of the first of these groups that occurs."""

_ZERO_WIDTH_JOINER = "\u200d"


def segments(text: str, window: int) -> Iterator[tuple[int, int]]:
    """The pieces of a text, as `(start, end)`, in order, none longer than `window` characters.

    Only white space lies between two pieces; no piece begins or ends with white space.
    """
    for sentence in _SENTENCE.finditer(text):
        start, end = _strip(text, sentence.start(), sentence.end())
        while end - start > window:
            cut = _cut(text, start, start + window)
            if start < (piece_end := _strip(text, start, cut)[1]):
                yield start, piece_end
            start, end = _strip(text, cut, end)
        if start < end:
            yield start, end


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _cut(text: str, start: int, limit: int) -> int:
    """Where to cut a sentence that begins at `start` and extends beyond `limit`.

    The cut is in the window's second half, because smaller pieces would give the model too little context.
    """
    earliest = (start + limit + 1) // 2
    for marks in _PLACES:
        if (cut := max(text.rfind(mark, earliest, limit) for mark in marks) + 1) > 0:
            return cut
    for cut in range(limit, earliest, -1):
        if text[cut - 1].isspace() or text[cut].isspace():
            return cut
    for cut in range(limit, earliest, -1):
        if not _belong_together(text[cut - 1], text[cut]):
            return cut
    return limit


def _belong_together(left: str, right: str) -> bool:
    return (
        (left.isascii() and left.isalnum() and right.isascii() and right.isalnum())
        or unicodedata.category(right).startswith("M")
        or right == _ZERO_WIDTH_JOINER
        or left == _ZERO_WIDTH_JOINER
        or "\udc00" <= right <= "\udfff"
    )
