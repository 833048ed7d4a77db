"""inferq usage: engine seconds and tasks per tenant, type and day."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

import typer

from inferq.producer.cli.output import JsonFlag, print_json, print_table
from inferq.schemas import InvalidTask
from inferq.storage import StatusIndex, StatusOutage, StorageSettings
from inferq.storage.status.usage import USAGE_DAYS, Usage

app = typer.Typer()

_SHOWN_DAYS = 30
_COUNTS = ("tasks", "succeeded", "failed", "cancelled", "retried")


@app.command()
def usage(
    first: Annotated[
        str | None,
        typer.Option("--from", help="The first day, in UTC: 2026-11-25 (default: 29 days before --to)."),
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="The last day (default: today).")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    task_type: Annotated[str | None, typer.Option("--type", help="Only this task type.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the engine seconds of tenants, types and days.

    Days are in UTC, and Redis keeps them for 400 days. Tasks that end without a worker, and ends that Redis
    missed while it was unavailable, are not in the numbers.
    """
    days = _days(first, last, datetime.now(UTC).date())
    index = StatusIndex.from_settings(StorageSettings.load())
    logging.getLogger("inferq.storage").addHandler(logging.NullHandler())  # main prints the error, once
    try:
        index.require_supported()
        found = [
            used for used in index.usage(days)
            if tenant in (None, used.tenant) and task_type in (None, used.task_type)
        ]  # fmt: skip
    except StatusOutage as error:
        raise StatusOutage(f"the usage is unknown: {error}") from error
    finally:
        index.close()
    if as_json:
        print_json([_facts(used) for used in found])
    elif as_csv:
        _print_csv(found)
    else:
        rows = [[*_facts(used).values()] for used in found]
        print_table(_COLUMNS, [*rows, _total(found)] if len(rows) > 1 else rows)


_COLUMNS = ("day", "tenant", "type", *_COUNTS, "engine seconds")


def _days(first: str | None, last: str | None, today: date) -> Sequence[date]:
    """The days from `first` to `last`. Raises InvalidTask."""
    end = _day("--to", last) if last else today
    begin = _day("--from", first) if first else end - timedelta(days=_SHOWN_DAYS - 1)
    if begin > end:
        raise InvalidTask(f"--from {begin} is after --to {end}; swap them")
    if (kept := today - timedelta(days=USAGE_DAYS)) > begin:
        raise InvalidTask(f"--from {begin} is too early: usage is kept for {USAGE_DAYS} days, since {kept}")
    return [begin + timedelta(days=number) for number in range((end - begin).days + 1)]


def _day(option: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise InvalidTask(f"{option} {text!r} is not a day; write 2026-11-25") from error


def _facts(used: Usage) -> dict[str, Any]:
    return {
        "day": used.day.isoformat(),
        "tenant": used.tenant,
        "type": used.task_type,
        **{name: getattr(used, name) for name in _COUNTS},
        "engine_seconds": round(used.engine_seconds, 3),
    }


def _total(found: Sequence[Usage]) -> Sequence[object]:
    counts = [sum(getattr(used, name) for used in found) for name in _COUNTS]
    return ["total", None, None, *counts, round(sum(used.engine_seconds for used in found), 3)]


def _print_csv(found: Sequence[Usage]) -> None:
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(_facts(Usage(date.min, "", "")))
    lines.writerows(_facts(used).values() for used in found)
