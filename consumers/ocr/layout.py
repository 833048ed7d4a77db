"""The reading order of a page's lines.

Rows are read from top to bottom, each from left to right, as in a form or a table. Columns of prose are read one
after another, each to its end. The direction of most of the text defines up and down. So a rotated or slightly
skewed page is read like an upright one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inferq.consumers.ocr import Line

_SPANNING = 0.55
"""A line wider than this share of the text is not part of a column."""
_COLUMN_LINES = 3
_COLUMN_WIDTH = 6.0
"""The minimum width of a column of prose, in line heights: a table's columns are often narrower."""
_COLUMN_FILL = 0.6
"""The minimum share of a prose column's width that its median line fills: a table's cells fill less."""
_GUTTER = 0.7
"""The minimum gap between two columns, in line heights."""


@dataclass(frozen=True, order=True)
class _Placed:
    """A line in the page's own coordinates: text runs along x, rows follow along y."""

    y: float
    left: float
    right: float
    height: float
    line_key: tuple[str, float, tuple[tuple[float, float], ...]]
    index: int

    @property
    def width(self) -> float:
        return self.right - self.left


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """The same lines in reading order, each once. The order of `lines` has no influence."""
    if not lines:
        return []
    angle = _text_direction(lines)
    placed = sorted(_place(index, line, angle) for index, line in enumerate(lines))
    return [lines[item.index] for section in _sections(placed) for item in section]


def _text_direction(lines: Iterable[Line]) -> float:
    """The angle (radians, clockwise on the page) along which most characters run."""
    weights = [0, 0, 0, 0]
    angles: list[list[float]] = [[], [], [], []]
    for line in lines:
        (x0, y0), (x1, y1) = line.box[0], line.box[1]
        if (x0, y0) == (x1, y1):
            continue
        angle = math.atan2(y1 - y0, x1 - x0)
        quarter = round(angle / (math.pi / 2)) % 4
        # Short lines say little about the slant.
        weight = len(line.text)
        weights[quarter] += weight
        slant = math.remainder(angle - quarter * math.pi / 2, 2 * math.pi)
        angles[quarter].extend([slant] * min(weight, 100))
    quarter = weights.index(max(weights))
    slants = sorted(angles[quarter])
    return quarter * math.pi / 2 + (slants[len(slants) // 2] if slants else 0.0)


def _place(index: int, line: Line, angle: float) -> _Placed:
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [x * cos + y * sin for x, y in line.box]
    ys = [y * cos - x * sin for x, y in line.box]
    return _Placed(
        y=math.fsum(ys) / 4,
        left=min(xs),
        right=max(xs),
        height=max(math.fsum((ys[2], ys[3], -ys[0], -ys[1])) / 2, 1.0),
        line_key=(line.text, line.score, line.box),
        index=index,
    )


def _sections(placed: Sequence[_Placed]) -> list[list[_Placed]]:
    """The page's sections, which are read one after another; `placed` is sorted."""
    extent = max(item.right for item in placed) - min(item.left for item in placed)
    spanning = [item for item in placed if item.width > _SPANNING * extent]
    bands: list[list[_Placed]] = [[] for _ in range(len(spanning) + 1)]
    between = 0
    for item in placed:
        if between < len(spanning) and item is spanning[between]:
            between += 1
        else:
            bands[between].append(item)
    sections: list[list[_Placed]] = []
    loose: list[_Placed] = []
    for number, band in enumerate(bands):
        columns = _columns(band)
        if columns:
            sections += _rows(loose)
            loose = []
            for column in columns:
                sections += _rows(column)
        else:
            loose += band
        if number < len(spanning):
            loose.append(spanning[number])
    return sections + _rows(loose)


def _columns(band: Sequence[_Placed]) -> list[list[_Placed]]:
    """The columns of prose in a band, from left to right; empty if the band has none."""
    if len(band) < 2 * _COLUMN_LINES:
        return []
    height = sorted(item.height for item in band)[len(band) // 2]
    columns: list[list[_Placed]] = []
    reach = -math.inf
    for item in sorted(band, key=lambda item: (item.left, item)):
        if item.left - reach >= _GUTTER * height:
            columns.append([])
        columns[-1].append(item)
        reach = max(reach, item.right)
    if len(columns) < 2 or not all(_is_prose(column, height) for column in columns):
        return []
    return columns


def _is_prose(column: Sequence[_Placed], height: float) -> bool:
    width = max(item.right for item in column) - min(item.left for item in column)
    middle = sorted(item.width for item in column)[len(column) // 2]
    return len(column) >= _COLUMN_LINES and width >= _COLUMN_WIDTH * height and middle >= _COLUMN_FILL * width


def _rows(items: Iterable[_Placed]) -> list[list[_Placed]]:
    rows: list[list[_Placed]] = []
    for item in sorted(items):
        if rows and _same_row(rows[-1], item):
            rows[-1].append(item)
        else:
            rows.append([item])
    return [sorted(row, key=lambda item: (item.left, item)) for row in rows]


def _same_row(row: Sequence[_Placed], item: _Placed) -> bool:
    # Compare with the row's last member as well, so that one tall line does not merge two rows.
    return all(abs(item.y - other.y) <= 0.5 * min(item.height, other.height) for other in (row[0], row[-1]))
