"""Texts and pages to draw. The lines of a page are in the order in which a person reads them."""

from __future__ import annotations

import math
import random

from inferq.consumers.ocr import Line

HEIGHT = 24
_PITCH = 36
_TOP = 300
_WORDS = ["new", "their", "data", "message", "per", "first", "to", "process", "these", "that", "it", "be", "results",
          "into", "the", "queue", "worker", "of", "is", "and", "reads", "each", "task"]  # fmt: skip


def sentence(choice: random.Random, characters: int) -> str:
    """A text of at least `characters` characters."""
    text = ""
    while len(text) < characters:
        text += choice.choice(_WORDS) + " "
    return text.strip()


def line(
    text: str, left: float, top: float, width: float, height: float = HEIGHT, *, angle: float = 0
) -> Line:
    """A line whose text runs at `angle` (degrees, clockwise) when the page is turned about its origin."""
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = tuple((x * cos - y * sin, x * sin + y * cos) for x, y in corners)
    return Line.model_construct(text=text, score=0.9, box=turned)


def _columns(
    count: int = 2, *, rows: int = 12, width: int = 500, gutter: int = 40, top: int = _TOP, shift: int = 0,
    name: str = "column", angle: float = 0,
) -> list[Line]:  # fmt: skip
    """Columns of prose of `count` × `rows` lines; each starts `shift` pixels lower than the one to its left."""
    return [
        line(
            f"{name} {column} line {row}",
            100 + column * (width + gutter),
            top + row * _PITCH + column * shift,
            width - (7 * row + 3 * column) % 10 if row < rows - 1 else width // 2,
            angle=angle,
        )
        for column in range(count)
        for row in range(rows)
    ]


def layouts(angle: float = 0) -> dict[str, list[Line]]:
    """Name → lines, turned about the page's origin by `angle` degrees."""

    def at(text: str, left: float, top: float, width: float, height: float = HEIGHT) -> Line:
        return line(text, left, top, width, height, angle=angle)

    def columns(count: int = 2, **options: int | str) -> list[Line]:
        return _columns(count, angle=angle, **options)  # type: ignore[arg-type]

    title, wide_title = at("A title", 470, 200, 320, 40), at("A wide title", 250, 150, 740, 40)
    end = _TOP + 12 * _PITCH
    across = at("A heading across both columns", 200, end + 10, 840)
    two = columns()
    overhang = columns()
    overhang[5] = at("one line that is longer", 100, _TOP + 5 * _PITCH, 545)
    jagged = [
        at(f"column {column} line {row}", left, _TOP + row * _PITCH, right - left)
        for column in range(2)
        for row in range(12)
        for left, right in [[(100, 598 + 5 * row % 7), (602 + (0, 3, 10, 24, 25, 26)[row % 6], 1140)][column]]
    ]
    uneven = [item for item in columns() if "column 1" not in item.text or item.text.endswith((" 0", " 1"))]
    return {
        "two columns": two,
        "columns with unlevel rows": columns(shift=15),
        "centred title": [title, *two],
        "wide title and authors": [wide_title, at("Two authors", 420, 220, 400), *two],
        "running header and page number": [at("Header", 100, 180, 200), at("42", 1110, 180, 30), *two],
        "page number at the left": [*two, at("17", 100, end + 60, 30)],
        "title and centred page number": [title, *two, at("3", 630, end + 60, 14)],
        "heading between two pairs of columns": [*two, across, *columns(top=end + 60, name="lower")],
        "three columns": columns(3, width=320),
        "three columns, title, page number": [title, *columns(3, width=320), at("3", 630, end + 60, 14)],
        "narrow gutter": columns(gutter=14),
        "line that overhangs the gutter": overhang,
        "columns whose boxes touch": jagged,
        "second column of two lines": uneven,
        "single column": columns(1, width=1040),
        "form": [
            at(text, x, _TOP + row * _PITCH, 14 * len(text))
            for row, (label, value) in enumerate([("Name", "Li Hua"), ("Born", "1990-02-03"), ("City", "Qingdao")])
            for x, text in ((100, label), (300, value))
        ],
        "table": [
            at(f"{name} {row}", x, _TOP + row * _PITCH, width)
            for row in range(8)
            for x, width, name in ((100, 360 - 31 * row, "item"), (600, 30, "count"), (800, 84, "price"))
        ],
        "table of long cells": [
            at(f"{name} {row}", x, _TOP + 60 * row, 330)
            for row in range(6)
            for x, name in ((100, "left"), (500, "right"))
        ],
    }  # fmt: skip
