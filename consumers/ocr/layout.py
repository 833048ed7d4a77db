"""The reading order of a page's lines.

Rows are read from top to bottom, each from left to right, as in a form or a table. Columns of prose are read one
after another, each to its end. A line across the gutter ends the columns above it. The direction of most of the
text defines up and down. So a rotated or slightly skewed page is read like an upright one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from inferq.consumers.ocr import Line

_COLUMN_LINES = 3
_SHORT_COLUMN_LINES = 2
"""The fewest lines of two columns side by side: of the longer one, and of the shorter one."""
_COLUMN_WIDTH = 6.0
"""The minimum width of a column of prose, in line heights: a table's columns are often narrower."""
_COLUMN_FILL = 0.6
"""The minimum share of a prose column's width that its median line fills: a table's cells fill less."""
_GUTTER = 0.25
"""The minimum gap between two columns at most lines, in line heights. Boxes are larger than the print."""
_OVERHANG = 1.0
"""A line is part of a column if it reaches at most this far beyond the gutter, in line heights."""
_STRAY = 0.1
"""The maximum share of lines that reach into the gutter."""
_LOOSE_ROWS = 1.0
"""Rows further apart than this, in line heights, are a table's if they are level in both columns."""
_APART = 1.25
"""The minimum space between columns and a page's header or footer, in line heights."""


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
    return [lines[item.index] for row in _sections(placed) for item in row]


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


@dataclass(frozen=True)
class _Band:
    """Columns side by side: `items[first:last]` of a sorted list; one of the columns begins at `start`."""

    first: int
    last: int
    start: float

    def overlaps(self, other: _Band) -> bool:
        return self.first < other.last and other.first < self.last


def _sections(items: Sequence[_Placed]) -> list[list[_Placed]]:
    """The page's rows in the order in which they are read; `items` is sorted."""
    rows: list[list[_Placed]] = []
    done = 0
    for band in _bands(items):
        left, right = _halves(items[band.first : band.last], band.start)
        rows += [*_rows(items[done : band.first]), *_sections(left), *_sections(right)]
        done = band.last
    return rows + _rows(items[done:])


def _bands(items: Sequence[_Placed]) -> list[_Band]:
    """The bands of columns among `items`, from top to bottom. Of two that overlap, the one with more lines."""
    if len(items) < _COLUMN_LINES + _SHORT_COLUMN_LINES:
        return []
    height = sorted(item.height for item in items)[len(items) // 2]
    found = []
    for start in _column_starts(items, height):
        for first, last in _runs(items, start, _OVERHANG * height):
            if not _is_gutter(items[first:last], start, height):
                continue
            first, last = _without_margins(items, first, last, height)
            if _is_band(items[first:last], start, height):
                found.append(_Band(first, last, start))
    chosen: list[_Band] = []
    for band in sorted(found, key=lambda band: band.first - band.last):
        if not any(band.overlaps(other) for other in chosen):
            chosen.append(band)
    return sorted(chosen, key=lambda band: band.first)


def _column_starts(items: Sequence[_Placed], height: float) -> list[float]:
    """The positions along x where two or more long lines start."""
    starts: dict[int, list[float]] = {}
    for item in items:
        if item.width >= _COLUMN_FILL * _COLUMN_WIDTH * height:
            starts.setdefault(round(item.left / (0.5 * height)), []).append(item.left)
    near = {cell: [*lefts, *starts.get(cell + 1, [])] for cell, lefts in sorted(starts.items())}
    return sorted({min(lefts) for lefts in near.values() if len(lefts) >= _SHORT_COLUMN_LINES})


def _runs(items: Sequence[_Placed], start: float, overhang: float) -> list[tuple[int, int]]:
    """The stretches of `items` without a line across `start`; such a line ends columns."""
    runs, first = [], 0
    for index, item in enumerate(items):
        if item.left < start - overhang and item.right > start + overhang:
            runs.append((first, index))
            first = index + 1
    runs.append((first, len(items)))
    return [(first, last) for first, last in runs if last - first >= _COLUMN_LINES + _SHORT_COLUMN_LINES]


def _without_margins(items: Sequence[_Placed], first: int, last: int, height: float) -> tuple[int, int]:
    """The range without a header's row at its start and a footer's row at its end."""
    rows = _rows(items[first:last])
    if len(rows) > 2 and _space(rows[0], rows[1]) >= _APART * height:
        first += len(rows[0])
        rows = rows[1:]
    if len(rows) > 2 and _space(rows[-2], rows[-1]) >= _APART * height:
        last -= len(rows[-1])
    return first, last


def _space(above: Iterable[_Placed], below: Iterable[_Placed]) -> float:
    return min(item.y - item.height / 2 for item in below) - max(item.y + item.height / 2 for item in above)


def _halves(items: Sequence[_Placed], start: float) -> tuple[list[_Placed], list[_Placed]]:
    """The lines left of `start`, and the others."""
    left: list[_Placed] = []
    right: list[_Placed] = []
    for item in items:
        (left if item.left + item.right < 2 * start else right).append(item)
    return left, right


def _is_band(items: Sequence[_Placed], start: float, height: float) -> bool:
    """Whether `items` are columns of prose side by side, one of which starts at `start`."""
    starts = _column_starts(items, height)
    others = [other for other in starts if abs(other - start) > _OVERHANG * height]
    if len(others) == len(starts):
        return False
    columns: list[list[_Placed]] = []
    rest = list(items)
    beside = 0
    for other in sorted([start, *others]):
        if other == start or _is_gutter(items, other, height):
            column, rest = _halves(rest, other)
            columns += [column] if column else []
            beside = len(columns) if other == start else beside
    columns += [rest] if rest else []
    if not 0 < beside < len(columns) or not all(_is_prose(column, height) for column in columns):
        return False
    pair = columns[beside - 1], columns[beside]
    return max(map(len, pair)) >= _COLUMN_LINES and not _is_table(*pair, height)


def _is_gutter(items: Sequence[_Placed], start: float, height: float) -> bool:
    """Whether a gutter ends near `start`: few lines reach into it, and most keep their distance from it."""
    left, right = _halves(items, start)
    if not left or not right:
        return False
    ends, begins = sorted(item.right for item in left), sorted(item.left for item in right)
    if begins[len(begins) // 2] - ends[len(ends) // 2] < _GUTTER * height:
        return False
    # Boxes end and begin unevenly: the gutter is where the fewest reach across.
    edges = [start, *(edge for edge in ends if abs(edge - start) <= _OVERHANG * height)]
    strays = min(len(ends) - bisect_right(ends, edge) + bisect_left(begins, edge) for edge in edges)
    return strays <= max(1, _STRAY * len(items))


def _is_table(left: Sequence[_Placed], right: Sequence[_Placed], height: float) -> bool:
    """Whether two columns have rows that are level and far apart."""
    ys = [item.y for item in left]
    level = 0
    for item in right:
        nearest = bisect_left(ys, item.y)
        level += any(_same_row([item], other) for other in left[max(nearest - 1, 0) : nearest + 1])
    spaces = sorted(_space([above], [below]) for above, below in pairwise(left))
    return 2 * level >= len(right) and spaces[len(spaces) // 2] > _LOOSE_ROWS * height


def _is_prose(column: Sequence[_Placed], height: float) -> bool:
    width = max(item.right for item in column) - min(item.left for item in column)
    middle = sorted(item.width for item in column)[len(column) // 2]
    return (
        len(column) >= _SHORT_COLUMN_LINES
        and width >= _COLUMN_WIDTH * height
        and middle >= _COLUMN_FILL * width
    )


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
