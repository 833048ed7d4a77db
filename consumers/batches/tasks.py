"""The task in a line, the same for feeding and for assembly."""

from __future__ import annotations

from inferq.schemas import InvalidTask, Task
from inferq.storage.batches.lines import Line, LineParser
from inferq.storage.batches.sources import DuplicateIds


def task_of(parser: LineParser, taken: DuplicateIds, line: Line) -> Task:
    """The task in a line. Raises InvalidTask, also if an earlier line has the same id."""
    first = taken.by(line.number)
    if first is not None:
        raise InvalidTask(f"the same task_id as line {first}: each task needs its own", code="duplicate_id")
    return parser.parse(line)
