"""Cuts a very long line at gaps in its print, and joins what is read."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from inferq.consumers.ocr.backend import RgbPage
from inferq.consumers.ocr.direction import Reading

_WIDEST = 60
"""The maximum ratio of width to height of a part: recognition's time and memory grow with it."""
_SEARCH = 4
"""How far from its ideal place a line may be cut, in heights of the line."""
_SPACE = 0.25
"""The minimum gap between two words, in heights of the line."""
_INK = 0.3
"""A column of pixels has print if its contrast is more than this share of the line's."""


@dataclass(frozen=True)
class Part:
    """A part of a line, and whether a space precedes it."""

    picture: RgbPage
    spaced: bool = False


def parts(line: RgbPage) -> list[Part]:
    """The line as one part, or as several of similar width if it is too long for the recognizer."""
    height, width = line.shape[:2]
    count = math.ceil(width / (height * _WIDEST))
    if count <= 1:
        return [Part(line)]
    count = math.ceil(width / (height * (_WIDEST - 2 * _SEARCH)))
    grey = cv2.cvtColor(line, cv2.COLOR_RGB2GRAY).astype(np.int16)
    contrast = grey.max(axis=0) - grey.min(axis=0)
    empty = contrast <= _INK * contrast.max()
    found, start, spaced = [], 0, False
    for number in range(1, count):
        ideal = round(width * number / count)
        low, high = ideal - _SEARCH * height, ideal + _SEARCH * height
        left, right = _widest_gap(empty, low, high)
        if left == right:
            left = right = low + int(contrast[low:high].argmin())
        cut = (left + right) // 2
        found.append(Part(line[:, start:cut], spaced))
        start, spaced = cut, right - left >= _SPACE * height
    return [*found, Part(line[:, start:], spaced)]


def joined(readings: Sequence[tuple[Part, Reading]]) -> Reading:
    """The reading of a whole line. Its score is the mean of its characters."""
    text, total, characters = "", 0.0, 0
    for part, reading in readings:
        new = reading.text.strip() if len(readings) > 1 else reading.text
        if part.spaced and text and new and not (_is_wide(text[-1]) or _is_wide(new[0])):
            text += " "
        text += new
        total += reading.score * reading.characters
        characters += reading.characters
    return Reading(text, total / characters if characters else 0.0)


def _widest_gap(
    empty: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], low: int, high: int
) -> tuple[int, int]:
    """The ends of the longest stretch of empty columns between `low` and `high`; the same twice if none is."""
    best, start = (low, low), low
    for column in range(low, high + 1):
        if column == high or not empty[column]:
            if column - start > best[1] - best[0]:
                best = (start, column)
            start = column + 1
    return best


def _is_wide(character: str) -> bool:
    """Whether a character belongs to a script without spaces between words."""
    return unicodedata.east_asian_width(character) in "WF"
