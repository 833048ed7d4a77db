"""The command line as a whole: its parts, and how errors are told."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from producer.cli import (
    batch,
    callbacks,
    dead,
    keys,
    listen,
    nightly,
    secrets,
    server,
    settings,
    tasks,
    topology,
)
from producer.cli.output import complain
from producer.client import Unauthorized
from producer.up.commands import down, up
from schemas import InferqError

app = typer.Typer(
    name="inferq",
    help="A task queue for AI inference on RabbitMQ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for part in (server.app, tasks.app, settings.app, listen.app):
    app.add_typer(part)
app.command()(nightly.beat)
app.command()(up)
app.command()(down)
app.add_typer(topology.app, name="topology", help="The exchanges and queues on the broker.")
app.add_typer(batch.app, name="batch", help="Many tasks from one source.")
app.add_typer(dead.app, name="dead", help="Tasks that could not be done.")
app.add_typer(keys.app, name="keys", help="The gateway's API keys.")
app.add_typer(nightly.app, name="nightly", help="Batches that a schedule starts.")
app.add_typer(callbacks.app, name="callback", help="What became of callbacks.")
app.add_typer(secrets.app, name="secrets", help="What callbacks are signed with.")
# The parts that are not the producer's: they announce themselves.
for point in sorted(entry_points(group="inferq.commands"), key=lambda point: point.name):
    app.add_typer(point.load())


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
    """Run the command line. An error that inferq knows is one line on standard error and exit status 1."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except Unauthorized as error:
        complain(f"{error}; set INFERQ_API_KEY (after `inferq up`: . .inferq/env)")
        sys.exit(1)
    except InferqError as error:
        complain(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
