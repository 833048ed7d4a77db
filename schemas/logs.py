"""Logging of every part: one line per event, as text for people or as JSON for machines.

Each line has `time`, `level`, `part` and `message`, and the context that is bound (structlog.contextvars): of a task,
a request, a callback or a batch. The lines of the libraries (pika, Celery, uvicorn) come out in the same form.

Control characters are escaped, so that logged text cannot forge a line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from inferq.schemas.settings import Settings

if TYPE_CHECKING:
    from types import TracebackType

LogFormat = Literal["text", "json"]

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PLAIN_VALUE = re.compile(r'[^\s"=]+')

_encode = json.JSONEncoder(default=str).encode

CONTEXT = ("task_id", "task_type", "tenant", "attempt", "batch_id", "trace_id")
"""The context that lines have, as far as it is known; bind it by these names."""

_log = logging.getLogger(__name__)


class LogSettings(Settings):
    """What every part logs, and in which form."""

    log_format: LogFormat | None = Field(
        None,
        description="Log format: `text` or `json` (default: `text` if standard error is a terminal, "
        "otherwise `json`).",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="The lowest level that is logged: DEBUG, INFO, WARNING or ERROR."
    )

    @property
    def form(self) -> LogFormat:
        """The form of this process's log."""
        return self.log_format or ("text" if sys.stderr.isatty() else "json")


def start_log(part: str, **context: object) -> None:
    """Log to standard error from now on, as `part`. Every line has the `context`, unless it has its own.

    INFERQ_LOG_LEVEL applies to inferq. Libraries log from WARNING on: below that they log URLs, headers and bodies.
    Raises InstallationError for bad settings.
    """
    settings = LogSettings.load()
    handler = logging.StreamHandler()
    handler.setFormatter(PartFormatter(settings.form, part, context))
    level = logging.getLevelNamesMapping()[settings.log_level]
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler])
    logging.getLogger("inferq").setLevel(level)
    # No line has them, and finding them out takes half of the time of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)
    sys.excepthook = _log_end
    threading.excepthook = _log_thread_end


def has_started() -> bool:
    """Whether this process logs as a part."""
    return sys.excepthook is _log_end


def fields(**values: object) -> dict[str, Any]:
    """The `extra` argument of a logging call that adds these fields to its line; None is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class PartFormatter(logging.Formatter):
    """Formats the records of a part, with the context that is bound where they are logged.

    structlog's own formatter takes half as long again: it makes a second record of each, for loggers of structlog.
    """

    def __init__(self, form: LogFormat, part: str, context: Mapping[str, object] | None = None) -> None:
        # The command line and the engine processes import this module, and structlog takes a while to load.
        from structlog.contextvars import get_contextvars

        super().__init__()
        self._render = _json if form == "json" else _text
        self._part = part
        self._always = context or {}
        self._bound = get_contextvars

    def format(self, record: logging.LogRecord) -> str:
        return self._render(_line(record, self._part, {**self._always, **self._bound()}))


def _line(record: logging.LogRecord, part: str, context: Mapping[str, Any]) -> dict[str, Any]:
    line = {
        "time": f"{_second(int(record.created))}.{int(record.created % 1 * 1000):03}Z",
        "level": record.levelname,
        "part": part,
        "message": record.getMessage(),
        **{name: context[name] for name in (*CONTEXT, *context) if context.get(name) is not None},
        "logger": record.name,
        **getattr(record, "fields", {}),
    }
    if record.exc_info and record.exc_info[0] is not None:
        line["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
    if record.stack_info:
        line["stack"] = record.stack_info
    return line


@lru_cache(1)
def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()[:19]


def _json(line: dict[str, Any]) -> str:
    return _encode(line)


def _text(line: dict[str, Any]) -> str:
    shown = [line.pop("time"), line.pop("level"), f"{line.pop('part')}:", line.pop("message")]
    del line["logger"]
    below = [line.pop(name) for name in ("exception", "stack") if name in line]
    shown += (f"{name}={_value(value)}" for name, value in line.items())
    first = escape_control(" ".join(map(str, shown)), keep="\t")
    return "\n".join([first, *map(_indented, below)])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _log_end(kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _log.critical("ended by an unexpected error", exc_info=(kind, error, stack))


def _log_thread_end(end: threading.ExceptHookArgs) -> None:
    name = end.thread.name if end.thread is not None else "?"
    if end.exc_value is not None and end.exc_type is not SystemExit:
        info = (end.exc_type, end.exc_value, end.exc_traceback)
        _log.error("thread %s was ended by an unexpected error", name, exc_info=info)


def escape_control(text: str, *, keep: str = "\n\t") -> str:
    """The text with its control characters escaped as in JSON, except those in `keep`.

    Much of the text comes from others, and a terminal executes control sequences. Lone surrogates, which
    Python puts into file names that are not UTF-8, cannot be printed at all.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


class LineFormatter(logging.Formatter):
    """Formats a record of the command line: its message with control characters escaped, and indents a stack."""

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
