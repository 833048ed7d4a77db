"""How the command line prints: tables for people, JSON for programs, errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

console = Console()
errors = Console(stderr=True)

_PIPE_WIDTH = 10_000
"""Columns of a table that no person looks at: nothing is folded there."""


def print_json(value: Any) -> None:
    """One JSON document, as it is: never coloured, wrapped or shortened."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False, indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table without lines, so that it can be copied and cut; times are local. An empty one is `none`."""
    lines = [[_cell(value) for value in row] for row in rows]
    if not lines:
        console.print("none")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        # What stands first is an id or a name, which has to be copied in one piece.
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for line in lines:
        table.add_row(*line)
    wide = console if console.is_terminal else Console(width=_PIPE_WIDTH)
    wide.print(table)


def _cell(value: object) -> Text:
    """As text: what stands in brackets would be taken for a style."""
    if isinstance(value, datetime):
        return Text(f"{value.astimezone():%Y-%m-%d %H:%M:%S}")
    return Text("" if value is None else str(value))


def complain(error: BaseException | str) -> None:
    """Tell an error on standard error."""
    errors.print("error:", style="bold red", end=" ")
    errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
