"""How the command line prints: tables for people, JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from inferq.schemas.logs import escape_control

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class _Harmless(Console):
    """A console that prints text as it is, and escapes control characters, so that the terminal executes none."""

    def __init__(self, **settings: Any) -> None:
        # Brackets are no markup, and ":cat:" in a task id is no emoji.
        super().__init__(markup=False, highlight=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_control(segment.text))


console: Console = _Harmless()
errors: Console = _Harmless(stderr=True)

_PIPE_WIDTH = 10_000
"""The width in columns of a table that goes to a pipe: wide enough that nothing is folded."""


def print_json(value: Any) -> None:
    """Print one JSON document without colours, wrapping or shortening."""
    text = escape_control(json.dumps(_plain(value), ensure_ascii=False, indent=2))
    if not _can_print(text):
        text = json.dumps(_plain(value), indent=2)
    sys.stdout.write(text + "\n")


def _can_print(text: str) -> bool:
    """Whether standard output's encoding, such as latin-1, has all characters of the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table without lines, easy to copy and cut. Times are local; an empty table is `none`."""
    lines = [[_cell(value) for value in row] for row in rows]
    if not lines:
        console.print("none")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        # The first column is an id or a name, which must be easy to copy.
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for line in lines:
        table.add_row(*line)
    unfolded().print(table)


def duration_text(seconds: float) -> str:
    """A duration in its two largest units, such as `1 h 6 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def unfolded() -> Console:
    """The console, or for a pipe one so wide that it folds nothing."""
    return console if console.is_terminal else _Harmless(width=_PIPE_WIDTH)


def print_records(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; on a terminal that is too narrow, print each row as a table of its fields."""
    lines = list(rows)
    cells = [[_cell(value).plain for value in line] for line in lines]
    needed = sum(1 + max(map(cell_len, column)) for column in zip(columns, *cells, strict=True))
    if not console.is_terminal or needed <= console.width:
        print_table(columns, lines)
        return
    for number, line in enumerate(lines):
        if number:
            console.print()
        print_table(["", ""], [(name, c) for name, c in zip(columns, line, strict=True) if c is not None])


def _cell(value: object) -> Text:
    """A cell as Text, because rich reads brackets in a str as a style. Escaped, so that its width is right."""
    if isinstance(value, datetime):
        return Text(f"{value.astimezone():%Y-%m-%d %H:%M:%S}")
    return Text("" if value is None else escape_control(str(value)))


def complain(error: BaseException | str) -> None:
    """Print an error on standard error."""
    errors.print("error:", style="bold red", end=" ")
    errors.print(str(error), soft_wrap=True)
