"""The command line as a whole, and how errors are told.

It imports nothing that only a command needs: the worker starts its engine process before it imports anything else.
"""

from __future__ import annotations

import io
import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from inferq.producer.cli.parts import LazyGroup
from inferq.standard_streams import open_standard_streams

_log = logging.getLogger(__name__)

app = typer.Typer(
    name="inferq",
    cls=LazyGroup,
    help="A task queue for AI inference on RabbitMQ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"inferq {version('inferq')}")  # noqa: T201 - the answer itself
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    return


def main() -> None:
    """Run the command line. An expected error is one line on standard error or in a part's log, and exit status 1.

    A missing package and a wrong setting are EXIT_CONFIG.
    """
    open_standard_streams()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):  # escape characters that the encoding lacks, instead of failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(logging.lastResort, logging.Handler):  # what a command logs that is no part
        logging.lastResort.setFormatter(_LineFormatter())
    try:
        app()
    except Exception as error:
        if (status := _tell(error)) is None:
            raise
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(error: Exception) -> int | None:
    """Tell an expected error. Gives the exit status; None if the error is unexpected."""
    from inferq.producer.cli.output import complain
    from inferq.producer.client.errors import Unauthorized
    from inferq.schemas import InferqError, InstallationError
    from inferq.schemas.logs import has_started

    match error:
        case InferqError():
            if has_started():
                _log.critical("%s", error)
            else:
                refused = isinstance(error, Unauthorized)
                complain(
                    f"{error}; set INFERQ_API_KEY (after `inferq up`: . .inferq/env)" if refused else error
                )
            return error.exit_status if isinstance(error, InstallationError) else 1
        case UnicodeEncodeError():  # an argument, such as an id, or a name that comes from one
            complain(f"{error.object!r} is not UTF-8: give it in UTF-8")
        case OSError():  # a file of the user's; a reader who has gone is seen to by typer
            complain(f"{error.filename}: {error.strerror}" if error.filename else error)
        case _:
            return None
    return 1


class _LineFormatter(logging.Formatter):
    """`schemas.logs.LineFormatter`, imported with the first record."""

    def format(self, record: logging.LogRecord) -> str:
        from inferq.schemas.logs import LineFormatter

        return LineFormatter().format(record)
