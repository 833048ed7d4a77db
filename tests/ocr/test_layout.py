"""Reading order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferq.consumers.ocr import Line
from inferq.consumers.ocr.layout import reading_order
from tests.ocr.layouts import layouts, line


def form(angle: float = 0) -> list[Line]:
    rows = [("Name", "Li Hua"), ("Born", "1990-02-03"), ("City", "Qingdao"), ("Road", "Lighthouse Road")]
    return [
        line(text, x, 40 * number, 12 * len(text), angle=angle)
        for number, row in enumerate(rows)
        for x, text in zip((0, 200), row, strict=True)
    ]


def two_columns(angle: float = 0) -> list[Line]:
    title = [line("A title that runs across both of the columns", 20, 0, 500, 30, angle=angle)]
    left = [line(f"left column, line {n} of six", 0, 60 + 30 * n, 250 - n, angle=angle) for n in range(6)]
    right = [line(f"right column, line {n} of six", 290, 61 + 30 * n, 248, angle=angle) for n in range(6)]
    footer = [line("A footer across the page, wide as the title", 20, 300, 480, angle=angle)]
    return title + left + right + footer


@pytest.mark.parametrize("angle", [0, 2.5, -4, 88, 90, 180, 183, 270, -92])
@pytest.mark.parametrize("make", [form, two_columns])
def test_the_order_holds_however_the_page_is_turned(make: object, angle: float) -> None:
    expected = make(angle)  # type: ignore[operator]
    shuffled = random.Random(7).sample(expected, len(expected))
    assert [item.text for item in reading_order(shuffled)] == [item.text for item in expected]


@pytest.mark.parametrize(
    "angle", [0, 2, 90, 183], ids=["upright", "skewed", "tiers of vertical text", "over"]
)
@pytest.mark.parametrize("name", layouts())
def test_the_order_is_a_readers(name: str, angle: float) -> None:
    expected = layouts(angle)[name]
    shuffled = random.Random(7).sample(expected, len(expected))
    assert [item.text for item in reading_order(shuffled)] == [item.text for item in expected]


def test_cells_of_different_height_in_one_row_stay_in_it() -> None:
    row = [line("Total", 0, 100, 90, 36), line("12.50", 300, 108, 60, 20), line("EUR", 400, 104, 50, 24)]
    below = [line("Thanks", 0, 140, 80)]
    assert reading_order(below + row[::-1]) == row + below


def test_a_table_is_read_row_by_row() -> None:
    cells = [
        line(text, x, 40 * row, width)
        for row in range(6)
        for x, width, text in ((0, 300 - 30 * row, f"item {row}"), (400, 25, str(row)), (500, 70, "9.99"))
    ]
    assert reading_order(cells[::-1]) == cells


def test_three_columns_of_prose_are_read_one_after_another() -> None:
    columns = [line(f"column {x} line {n}", 300 * x, 30 * n, 260 - 3 * n) for x in range(3) for n in range(5)]
    assert reading_order(columns[::-1]) == columns


def test_no_lines_are_in_order() -> None:
    assert reading_order([]) == []


def test_boxes_without_extent_are_kept() -> None:
    dots = [Line(text="x", score=1, box=((5, y),) * 4) for y in (1, 2)]  # type: ignore[arg-type]
    assert reading_order(dots[::-1]) == dots


coordinate = st.floats(0, 2000, allow_nan=False)
point = st.tuples(coordinate, coordinate)
any_line = st.builds(
    Line,
    text=st.text(min_size=1, max_size=30),
    score=st.floats(0, 1),
    box=st.tuples(point, point, point, point),
)


@given(lines=st.lists(any_line, max_size=25), seed=st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_every_line_comes_out_once_in_an_order_of_its_own(lines: list[Line], seed: random.Random) -> None:
    ordered = reading_order(lines)
    assert sorted(map(repr, ordered)) == sorted(map(repr, lines))
    shuffled = list(lines)
    seed.shuffle(shuffled)
    assert reading_order(shuffled) == ordered
