"""inferq callback: what became of callbacks, and sending them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from producer.cli.output import JsonFlag, console, print_json, print_table
from producer.client import Client
from schemas import CallbackRecord, InvalidTask

app = typer.Typer(no_args_is_help=True)

TaskId = Annotated[str, typer.Argument(metavar="ID", help="The task's id.")]


def _print(records: Sequence[CallbackRecord], as_json: bool) -> None:
    if as_json:
        print_json(list(records))
    elif not records:
        console.print("none")
    else:
        print_table(
            ["callback", "task", "event", "state", "attempts", "last", "next", "url"],
            [
                (r.callback_id, r.subject_id, r.event, r.state, len(r.attempts), _last(r), r.next_at, r.url)
                for r in records
            ],
        )


def _last(record: CallbackRecord) -> str | None:
    if not record.attempts:
        return record.reason
    last = record.attempts[-1]
    return last.error if last.status is None else str(last.status)


@app.command("list")
def list_(
    task_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="The task's id; without it, all that failed.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List a task's callbacks, or the newest of all that were given up."""
    with Client() as client:
        found = client.failed_callbacks() if task_id is None else client.callbacks(task_id)
    _print(found, as_json)


@app.command()
def show(task_id: TaskId, callback_id: str, as_json: JsonFlag = False) -> None:
    """Show a callback, attempt by attempt."""
    with Client() as client:
        found = [record for record in client.callbacks(task_id) if record.callback_id == callback_id]
    if not found:
        raise InvalidTask(f"task {task_id!r} has no callback {callback_id!r}", code="not_found")
    if as_json:
        print_json(found[0])
        return
    _print(found, as_json)
    print_table(
        ["at", "seconds", "status", "error", "response"],
        [(a.at, a.seconds, a.status, a.error, a.response) for a in found[0].attempts],
    )


@app.command()
def resend(
    task_id: TaskId,
    callback_id: Annotated[
        str | None, typer.Argument(metavar="[CALLBACK_ID]", help="Without it, all that failed.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Send a callback again, under the same webhook-id."""
    with Client() as client:
        _print(client.resend(task_id, callback_id), as_json)
