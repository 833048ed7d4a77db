"""A log's lines, whatever the text in them."""

from __future__ import annotations

import logging
from pathlib import Path

from inferq.schemas.logs import PART_FORMAT, LineFormatter

FORGED = "x\n2026-11-30 10:00:00,000 INFO all is well\r\x1b[2J\u2028\x85\tü"


def formatted(*arguments: object, error: BaseException | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("a", logging.ERROR, "", 1, "url %r: %s", arguments, info)
    record.exc_text = "as another formatter wrote it\n2026"
    return LineFormatter(PART_FORMAT).format(record)


def test_text_in_a_message_neither_begins_a_line_nor_moves_the_cursor() -> None:
    line = formatted("u", FORGED)
    assert line.endswith(
        r" ERROR url 'u': x\u000a2026-11-30 10:00:00,000 INFO all is well\u000d\u001b[2J\u2028\u0085" + "\tü"
    )
    assert len(line.splitlines()) == 1


def test_lines_of_a_stack_are_indented_and_hold_no_control_characters() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        first, *others = formatted("u", "v", error=error).split("\n")
    assert first.endswith("ERROR url 'u': v")
    assert "  Traceback (most recent call last):" in others
    assert r"  2026-11-30 10:00:00,000 INFO all is well\u000d\u001b[2J\u2028\u0085" + "\tü" in others
    assert all(line.startswith("  ") for line in others)


def test_every_part_sets_up_its_log_in_one_place() -> None:
    root = Path(__file__).parents[2]
    calls = [
        str(file.relative_to(root))
        for room in ("broker", "consumers", "producer", "schemas", "storage")
        for file in (root / room).rglob("*.py")
        if "basicConfig(" in file.read_text("utf-8")
    ]
    assert calls == ["schemas/logs.py"]
