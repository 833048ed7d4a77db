"""inferq dead: list, redrive and purge dead letters."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from inferq.broker import BrokerSettings, DeadLetter, DeadLetters, Filter
from inferq.producer.cli.output import JsonFlag, console, errors, print_json, print_table
from inferq.schemas import InvalidTask, get_type

app = typer.Typer(name="dead", help="List, redrive and purge dead letters.", no_args_is_help=True)

Type = Annotated[str, typer.Argument(metavar="TYPE", help="The task type.")]
Reason = Annotated[str | None, typer.Option(help="Only those with this reason, e.g. not_an_image.")]
Since = Annotated[
    str | None, typer.Option(help="Only those newer than this: 30m, 12h or 7d, or a date and time.")
]
TaskId = Annotated[str | None, typer.Option("--id", help="Only this task.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The most dead letters to take.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the selected dead letters; change nothing.")]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _moment(text: str) -> datetime:
    if text[-1:] in _UNITS and text[:-1].isdigit():
        return datetime.now(UTC) - timedelta(**{_UNITS[text[-1]]: int(text[:-1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidTask(
            f"--since {text!r} is neither a span nor a date and time; write 12h or 2026-11-25T01:30"
        ) from error
    return moment if moment.tzinfo else moment.astimezone()


def _filter(reason: str | None, since: str | None, task_id: str | None, limit: int | None) -> Filter:
    return Filter(reason, _moment(since) if since else None, task_id, limit)


def _letters(task_type: str) -> DeadLetters:
    return DeadLetters(BrokerSettings.load(), get_type(task_type).name)


def _facts(letter: DeadLetter) -> dict[str, Any]:
    return {
        "task_id": letter.task_id,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "worker": letter.worker,
        "time": letter.time.isoformat(timespec="seconds") if letter.time else None,
    }


def header_value(value: object) -> object:
    """An AMQP field value as JSON has it. Times in ISO format, anything else that JSON lacks as text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(name): header_value(each) for name, each in value.items()}
        case list():
            return [header_value(each) for each in value]
        case datetime():
            return value.isoformat()
        case bytes():
            return value.decode(errors="replace")
    return str(value)


def _print(letters: list[DeadLetter], as_json: bool) -> None:
    if as_json:
        print_json([_facts(letter) for letter in letters])
    elif letters:
        rows = [list((_facts(letter) | {"time": letter.time}).values()) for letter in letters]
        print_table(["task", "reason", "error", "attempts", "worker", "time"], rows)


@app.command("list")
def list_(
    task_type: Type,
    reason: Reason = None,
    since: Since = None,
    task_id: TaskId = None,
    limit: Annotated[int, typer.Option(min=1, help="The most dead letters to list.")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """List the dead letters of a type, the oldest first.

    While it reads, other readers do not see the dead letters that it has read.
    """
    with _letters(task_type) as letters:
        found = letters.read(_filter(reason, since, task_id, limit))
    _print(found, as_json)
    if not found and not as_json:
        console.print("none")
    if len(found) == limit:
        errors.print(f"stopped after {limit}; there may be more: set --limit")


@app.command()
def show(task_type: Type, task_id: Annotated[str, typer.Argument(metavar="TASK_ID")]) -> None:
    """Print a task's first dead letter as JSON, with its message and headers.

    A task id may have more than one: `dead list --id` lists them all.
    """
    with _letters(task_type) as letters:
        found = letters.read(Filter(task_id=task_id, limit=1))
    if not found:
        raise InvalidTask(f"no dead letter of type {task_type!r} has the id {task_id!r}", code="not_found")
    print_json(
        [
            _facts(letter)
            | {
                "routing_key": letter.delivery.routing_key,
                "headers": header_value(letter.delivery.headers),
                "body": letter.delivery.body.decode(errors="replace"),
            }
            for letter in found
        ]
    )


@app.command()
def redrive(
    task_type: Type,
    reason: Reason = None,
    since: Since = None,
    task_id: TaskId = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Queue dead letters again, as first attempts."""
    wanted = _filter(reason, since, task_id, limit)
    with _letters(task_type) as letters:
        found = letters.read(wanted) if dry_run else letters.redrive(wanted)
    _print(found, as_json)
    if not as_json:
        console.print(f"{len(found)} {'would be ' if dry_run else ''}redriven")


@app.command()
def purge(
    task_type: Type,
    reason: Reason = None,
    since: Since = None,
    task_id: TaskId = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete dead letters. The results of their tasks stay."""
    wanted = _filter(reason, since, task_id, limit)
    if not dry_run and not yes:
        typer.confirm("Delete these dead letters for good?", abort=True, err=True)
    with _letters(task_type) as letters:
        found = letters.read(wanted) if dry_run else letters.purge(wanted)
    _print(found, as_json)
    if not as_json:
        console.print(f"{len(found)} {'would be ' if dry_run else ''}purged")
