"""Logging of every part: one line per event.

Control characters are escaped, so that logged text cannot forge a line.
"""

from __future__ import annotations

import logging
import re
import textwrap

PART_FORMAT = "%(asctime)s %(levelname)s %(message)s"

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escape_control(text: str, *, keep: str = "\n\t") -> str:
    """The text with its control characters escaped as in JSON, except those in `keep`.

    Much of the text comes from others, and a terminal executes control sequences. Lone surrogates, which
    Python puts into file names that are not UTF-8, cannot be printed at all.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


class LineFormatter(logging.Formatter):
    """Formats a record as one line with its control characters escaped, and indents the lines of a stack below it."""

    def format(self, record: logging.LogRecord) -> str:
        kept, record.exc_text = record.exc_text, None  # another formatter's text
        try:
            return super().format(record)
        finally:
            record.exc_text = kept

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return escape_control(super().formatMessage(record), keep="\t")

    def formatException(self, ei: object) -> str:  # noqa: N802
        return _indented(super().formatException(ei))  # type: ignore[arg-type] # a private type

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(super().formatStack(stack_info))


def _indented(lines: str) -> str:
    return textwrap.indent(escape_control(lines), "  ")


def start_log(level: int | str = logging.INFO, *, form: str = PART_FORMAT) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])
