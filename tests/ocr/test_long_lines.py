"""Lines many times as wide as they are high."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.ocr import OcrOutput
from inferq.consumers.ocr.direction import Reading
from inferq.consumers.ocr.long_lines import Part, joined, parts
from tests.ocr.layouts import sentence


# Squeezed to 4:1, the first two look upside down to the classifier. The third is twice as wide as the
# recognizer takes.
@pytest.mark.parametrize(("seed", "characters", "size"), [(11, 110, 16), (6, 180, 18), (3, 420, 18)])
def test_a_long_line_is_read_to_the_letter(
    read: Callable[..., OcrOutput], tmp_path: Path, seed: int, characters: int, size: int
) -> None:
    text = sentence(random.Random(seed), characters)
    font = ImageFont.load_default(size)
    page = Image.new("L", (int(font.getlength(text)) + 40, 80), 255)
    ImageDraw.Draw(page).text((20, 20), text, font=font)
    page.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").text == text


def strip(width: int, *gaps: tuple[int, int]) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """A line 10 pixels high that is striped all over, except for the gaps."""
    line = np.full((10, width, 3), 255, np.uint8)
    line[4:6] = 0
    for left, right in gaps:
        line[:, left:right] = 255
    return line


def test_a_line_is_cut_in_the_middle_of_the_widest_gap_near() -> None:
    found = parts(strip(1000, (480, 481), (505, 509), (600, 640)))
    assert [part.picture.shape[1] for part in found] == [507, 493]
    assert [part.spaced for part in found] == [False, True]
    letters = parts(strip(1000, (505, 507)))
    assert [part.picture.shape[1] for part in letters] == [506, 494]
    assert [part.spaced for part in letters] == [False, False]


def test_a_line_without_a_gap_is_cut_all_the_same() -> None:
    found = parts(strip(1300))
    assert sum(part.picture.shape[1] for part in found) == 1300
    assert all(part.picture.shape[1] <= 600 for part in found)
    assert [part.picture.shape[1] for part in parts(strip(600))] == [600]


@pytest.mark.parametrize(
    ("left", "right", "spaced", "text"),
    [
        ("two", "words", True, "two words"),
        ("inter", "esting", False, "interesting"),
        ("开门，", "晚上", True, "开门，晚上"),
        ("", "only", True, "only"),
    ],
)
def test_parts_are_joined_as_they_stood(left: str, right: str, spaced: bool, text: str) -> None:
    one = np.zeros((1, 1, 3), np.uint8)
    line = joined([(Part(one), Reading(left, 0.9)), (Part(one, spaced), Reading(right, 0.9))])
    assert line.text == text
    assert line.score == pytest.approx(0.9)
