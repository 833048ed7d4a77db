"""inferq callback: list callbacks, show their attempts, and send them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from inferq.producer.cli.output import JsonFlag, complain, print_json, print_records, print_table
from inferq.producer.client.sync_client import Client
from inferq.schemas import CallbackRecord, InvalidTask, SubjectKind
from inferq.storage.fetch.urls import redacted

app = typer.Typer(name="callback", help="List callbacks and send them again.", no_args_is_help=True)

SubjectId = Annotated[str, typer.Argument(metavar="ID", help="The task's id, or with --batch the batch's.")]
BatchFlag = Annotated[bool, typer.Option("--batch", help="ID is a batch's, or a nightly run's.")]

_NAMED = 10
"""The most callbacks that an error names."""


def _print(records: Sequence[CallbackRecord], as_json: bool) -> None:
    if as_json:
        print_json(list(records))
    else:
        print_records(
            ["callback", "of", "id", "event", "state", "attempts", "last", "next", "url"],
            [
                (
                    r.callback_id,
                    r.subject_kind,
                    r.subject_id,
                    r.event,
                    r.state,
                    len(r.attempts),
                    _last(r),
                    r.next_at,
                    redacted(r.url),
                )
                for r in records
            ],
        )


def _kind(batch: bool) -> SubjectKind:
    return "batch" if batch else "task"


def _last(record: CallbackRecord) -> str | None:
    if not record.attempts:
        return record.reason
    last = record.attempts[-1]
    return last.error if last.status is None else str(last.status)


@app.command("list")
def list_(
    subject_id: Annotated[
        str | None,
        typer.Argument(
            metavar="ID", help="The task's id, or with --batch the batch's (default: all that failed)."
        ),
    ] = None,
    batch: BatchFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """List the callbacks of a task or batch, or the newest that failed for good."""
    with Client() as client:
        found = (
            client.failed_callbacks()
            if subject_id is None
            else client.callbacks(subject_id, kind=_kind(batch))
        )
    _print(found, as_json)


@app.command()
def show(
    subject_id: SubjectId,
    callback_id: Annotated[
        str | None, typer.Argument(metavar="CALLBACK_ID", help="The callback, if there are several.")
    ] = None,
    batch: BatchFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show a callback, attempt by attempt."""
    with Client() as client:
        known = client.callbacks(subject_id, kind=_kind(batch))
    found = _chosen(known, f"{_kind(batch)} {subject_id!r}", callback_id)
    if as_json:
        print_json(found)
        return
    _print([found], as_json)
    if found.attempts:
        print_table(
            ["at", "seconds", "status", "error", "response"],
            [(a.at, a.seconds, a.status, a.error, a.response) for a in found.attempts],
        )


def _chosen(known: Sequence[CallbackRecord], subject: str, callback_id: str | None) -> CallbackRecord:
    if callback_id is not None:
        known = [record for record in known if record.callback_id == callback_id]
    match known:
        case [only]:
            return only
        case []:
            what = "has no callbacks" if callback_id is None else f"has no callback {callback_id!r}"
            raise InvalidTask(f"{subject} {what}", code="not_found")
        case _:
            newest = ", ".join(
                f"{record.callback_id} ({record.event})" for record in known[: -1 - _NAMED : -1]
            )
            more = ", …" if len(known) > _NAMED else ""
            raise InvalidTask(
                f"{subject} has {len(known)} callbacks; choose one: {newest}{more}", code="several"
            )


@app.command()
def resend(
    subject_id: SubjectId,
    callback_id: Annotated[
        str | None, typer.Argument(metavar="CALLBACK_ID", help="The callback (default: all that failed).")
    ] = None,
    batch: BatchFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Send a callback again, under the same webhook-id. Exit status 1 if there is none to send."""
    with Client() as client:
        sent = client.resend(subject_id, callback_id, kind=_kind(batch))
    if sent or as_json:
        _print(sent, as_json)
    if not sent:
        flag = " --batch" if batch else ""
        complain(
            f"no callback of {subject_id} has failed; to repeat a delivered one: "
            f"inferq callback resend {subject_id} CALLBACK_ID{flag}"
        )
        raise typer.Exit(1)
