"""Texts that read both ways up follow their page, whichever way up it is scanned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.ocr import Line, OcrOutput
from inferq.consumers.ocr.direction import (
    Reading,
    Way,
    best,
    is_sideways,
    pieces,
    settled,
    upside_down,
    ways,
)

Read = Callable[..., OcrOutput]

BOTH_WAYS = ["NO", "9", "06", "HO", "u", "W", "88", "OH", "6", "SOS", "n", "90"]
"""Short texts that are also texts when they are turned over."""


def form(*, words: bool = True) -> Image.Image:
    """A page with three lines of prose and a grid of short texts, one at each multiple of (160, 70)."""
    page = Image.new("RGB", (760, 480), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(30)
    if words:
        for row in range(3):
            pen.text((40, 20 + 50 * row), "The page stands upright here.", font=font, fill="black")
    for number, text in enumerate(BOTH_WAYS):
        pen.text(
            (80 + 160 * (number % 4), 230 + 70 * (number // 4)), text, font=font, fill="black", anchor="ls"
        )
    return page


def upright(lines: tuple[Line, ...], size: tuple[int, int], quarters: int) -> list[tuple[str, float, float]]:
    """Texts, and where each starts along x and ends below it on the page before it was turned."""
    found = []
    for line in lines:
        corners = np.array(line.box)
        width, height = size
        for _ in range(quarters):  # undo one counterclockwise turn of a page that is now (width, height)
            corners = np.stack([height - corners[:, 1], corners[:, 0]], axis=1)
            width, height = height, width
        found.append((line.text, *(corners[1] - corners[0])))
    return found


@pytest.mark.parametrize("quarters", range(4), ids=["upright", "to the left", "over", "to the right"])
def test_a_text_that_reads_both_ways_follows_its_page(read: Read, tmp_path: Path, quarters: int) -> None:
    turned = np.rot90(np.array(form()), quarters)
    Image.fromarray(turned).save(tmp_path / "a.png")
    page = read(tmp_path / "a.png", min_score=0).pages[0]
    found = upright(page.lines, (page.width, page.height), quarters)
    assert [text for text, _, _ in found[3:]] == BOTH_WAYS
    # Each box starts where its text starts: to the left on the page that stands upright.
    assert all(across > 0 and abs(down) < 10 for _, across, down in found)


def test_a_page_of_such_texts_alone_is_taken_to_stand_upright(read: Read, tmp_path: Path) -> None:
    form(words=False).save(tmp_path / "a.png")
    assert [line.text for line in read(tmp_path / "a.png", min_score=0).pages[0].lines] == BOTH_WAYS


def test_a_line_that_is_printed_upside_down_on_an_upright_page_is_read(read: Read, tmp_path: Path) -> None:
    page = form()
    line = Image.new("RGB", (420, 50), "white")
    ImageDraw.Draw(line).text((5, 5), "Answers are on page 42", font=ImageFont.load_default(30), fill="black")
    page.paste(line.rotate(180), (300, 420))
    page.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").text.splitlines()[-1] == "Answers are on page 42"


@pytest.mark.parametrize(
    ("own", "turned", "kept"),
    [
        (Reading("NO", 0.98), Reading("ON", 1.0), "NO"),  # slightly better is no evidence
        (Reading("9", 0.8), Reading("6", 1.0), "9"),  # nor is a single character
        (Reading("s1ueud", 0.6), Reading("Harbour", 0.99), "Harbour"),
        (Reading("", 0.0), Reading("Harbour", 0.99), "Harbour"),
        (Reading("a b c", 0.6), Reading("o o o", 1.0), "a b c"),  # spaces are no characters
    ],
)
def test_a_line_leaves_its_page_on_clear_evidence_only(own: Reading, turned: Reading, kept: str) -> None:
    both = ways(0.1, sideways=False, over=(False, False), vote=0)
    assert both == [Way(0), Way(2, 4)]
    assert (own, turned)[best(list(zip(both, (own, turned), strict=True)))].text == kept


def test_a_line_that_the_classifier_confirms_is_read_once() -> None:
    assert ways(0.1, sideways=False, over=(False, False), vote=-1) == [Way(0)]
    assert ways(0.1, sideways=False, over=(True, False), vote=5) == [Way(2)]
    assert ways(9, sideways=True, over=(False, True), vote=1) == [Way(3)]


def test_the_first_way_to_read_a_box_is_the_pages() -> None:
    narrow_digit, square, label = 2.2, 1.0, 8.0
    upside = {"over": (True, False), "vote": 0}
    assert ways(narrow_digit, sideways=False, **upside)[0] == Way(2)  # type: ignore[arg-type]
    assert ways(square, sideways=True, over=(False, True), vote=0)[0] == Way(3)
    assert ways(label, sideways=False, over=(False, False), vote=-1)[0] == Way(1)


@pytest.mark.parametrize(
    ("ratios", "sideways"),
    [
        ([0.1, 0.1, 8.0], False),
        ([8.0, 7.0, 0.1, 1.0, 1.0, 1.0], True),
        ([2.2, 2.0, 2.1], False),  # a column of the digit 1
        ([], False),
    ],
)
def test_a_page_lies_on_its_side_if_most_of_its_lines_do(ratios: list[float], sideways: bool) -> None:
    assert is_sideways(ratios) is sideways


def test_a_page_is_upside_down_if_the_classifier_and_the_recognizer_say_so() -> None:
    plain, better = [Reading("8u!ssaɔoɹd", 0.7)], [Reading("processing", 0.99)]
    alike, slightly = [Reading("6009", 0.97)], [Reading("6009", 0.99)]
    assert settled([-5, -1, 2]) is False
    assert settled([1, -1]) is None
    assert upside_down([], plain, better)
    assert not upside_down([], better, plain)
    assert not upside_down([1], alike, slightly)
    assert upside_down([1, 1, 1], alike, slightly)
    assert not upside_down([1, 1, 1], slightly, alike)
    assert not upside_down([1, 1, 1], [Reading("x", 0.5)], [Reading("X", 0.9)])


def test_the_classifier_sees_a_long_line_in_pieces_of_its_own_shape() -> None:
    line = np.zeros((20, 900, 3), np.uint8)
    line[:, -1] = 255
    parts = pieces(line)
    assert [part.shape[:2] for part in parts] == [(20, 80)] * 5
    assert parts[-1][0, -1, 0] == 255
    assert [part.shape[:2] for part in pieces(line[:, :120])] == [(20, 120)]
