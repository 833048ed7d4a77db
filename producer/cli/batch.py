"""inferq batch: many tasks from a JSONL file, a folder, globs or an s3:// prefix, through the gateway."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from pydantic import JsonValue
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from inferq.producer.batch.checks import check_files, check_lines
from inferq.producer.cli.arguments import parse_assignments
from inferq.producer.cli.files import files_of, uploaded
from inferq.producer.cli.output import (
    JsonFlag,
    complain,
    console,
    duration_text,
    errors,
    print_json,
    print_table,
)
from inferq.producer.client.errors import NotEnded, NotFound, Unavailable
from inferq.producer.client.sync_client import Client
from inferq.producer.client.transfers import is_batch_url
from inferq.schemas import BatchStatus, InvalidTask, Priority, get_type, new_task_id, tracing
from inferq.schemas.batch_source import JSONL_ENDINGS, input_field, is_prefix, line_of

app = typer.Typer(
    name="batch", help="Submit many tasks from one source, and follow them.", no_args_is_help=True
)

_LOOK_SECONDS = 1.0
_LINE_SECONDS = 10.0
"""Seconds between two lines of progress if standard error is not a terminal."""

BatchId = Annotated[str, typer.Argument(metavar="ID")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Follow it, and save output.jsonl and errors.jsonl in this folder."),
]
Into = Annotated[Path | None, typer.Option("--out", help="Save it as this file, or in this folder.")]


@app.command()
def submit(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="A JSONL file, folders and globs, or s3://bucket/prefix."),
    ],
    task_type: Annotated[
        str | None, typer.Option("--type", help="The task type, if the lines do not name it.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="A field or an option of all tasks; needs --type."),
    ] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    max_in_flight: Annotated[
        int | None, typer.Option(min=1, help="The most tasks queued or running at a time.")
    ] = None,
    batch_id: Annotated[str | None, typer.Option("--id", help="Your own id for the batch.")] = None,
    callback: Annotated[
        str | None, typer.Option(metavar="URL", help="A URL to notify when the batch ends.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its progress until it ends.")] = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a batch. With --follow or --out, exit status 1 unless every line has succeeded.

    Each file of a folder is uploaded and becomes a task. Files that are empty, unreadable or too large are
    skipped and named, as are unreadable folders; the exit status is then 1. Ctrl-C while following leaves
    the batch running.
    """
    if priority not in get_args(Priority):
        raise InvalidTask(f"--priority {priority!r} is not one of {', '.join(get_args(Priority))}")
    if assignments and task_type is None:
        raise InvalidTask("--set needs --type: each task type has its own fields")
    defaults: dict[str, JsonValue] = {}
    if task_type is not None:
        defaults = parse_assignments(get_type(task_type), assignments or [])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before the upload, so that an error costs nothing
    name = batch_id or new_task_id()
    given = defaults if task_type is None else {"task_type": task_type, **defaults}
    with (
        tracing.exporting("cli", required=False),
        tracing.span("inferq batch submit", "client"),
        Client() as client,
        _source(client, sources, given, batch_id) as (source, skipped),
    ):
        status = client.submit_batch(
            source,
            batch_id=name,
            task_type=task_type,
            defaults=defaults or None,
            priority=priority,  # type: ignore[arg-type] # checked above
            max_in_flight=max_in_flight,
            callback_url=callback,
        )
        if not as_json or follow or out:
            errors_or_output = errors if as_json else console
            errors_or_output.print(status.batch_id)
        if skipped:
            complain(f"skipped {skipped} files or folders, named above; the batch has the others")
        if follow or out:
            _finish(client, status.batch_id, out, as_json)
        elif as_json:
            print_json(status)
    if skipped:
        raise typer.Exit(1)


@contextmanager
def _source(
    client: Client,
    sources: Sequence[str],
    given: dict[str, JsonValue],
    batch_id: str | None,
) -> Iterator[tuple[str | Path, int]]:
    """Give the source to submit, and the number of files and folders that were skipped.

    The source is the given URL or JSONL file, or a JSONL file of uploaded files. `given` are the fields that
    all tasks share. Raises InvalidTask before the first upload if the batch cannot work.
    """
    if len(sources) == 1:
        (only,) = sources
        if is_batch_url(only):
            check = check_files if is_prefix(only) else check_lines
            check(given)
            yield only, 0
            return
        if only.endswith(JSONL_ENDINGS):
            path = Path(only)
            if not path.is_file():
                raise InvalidTask(f"there is no file {only!r}", code="input_not_found")
            if path.stat().st_size == 0:
                raise InvalidTask(f"{only!r} is empty: it holds no task", code="empty_batch")
            check_lines(given)
            yield path, 0
            return
    for source in sources:
        if is_batch_url(source) or source.endswith(JSONL_ENDINGS):
            raise InvalidTask(f"{source!r} cannot be combined with other sources: submit it alone")
    field = input_field(given)
    check_files(given)
    unread: set[Path] = set()
    files = files_of(sources, unread)
    first = next(files, None)
    if first is None:
        raise InvalidTask(f"there are no files in {', '.join(sources)}: the batch would be empty")
    if batch_id is not None:
        _check_new(client, batch_id)
    with tempfile.TemporaryDirectory(prefix="inferq-batch-") as folder:
        made = Path(folder) / "batch.jsonl"
        skipped = 0
        with made.open("wb") as lines:
            for path, url in uploaded(client, first, files):
                if url is None:
                    skipped += 1
                else:
                    lines.write(line_of(field, url, str(path)))
        if made.stat().st_size == 0:
            raise InvalidTask("every file was skipped: there is nothing to submit", code="empty_batch")
        yield made, skipped + len(unread)


def _check_new(client: Client, batch_id: str) -> None:
    """Raise InvalidTask if the batch exists: a second upload would give its files new URLs."""
    with suppress(NotFound):
        client.batch(batch_id)
        raise InvalidTask(
            f"batch {batch_id!r} exists already, and an id takes files only once; to follow that batch: "
            f"inferq batch status {batch_id} --follow; to submit a new one: choose another --id",
            code="id_conflict",
        )


def _finish(client: Client, batch_id: str, out: Path | None, as_json: bool) -> None:
    """Follow a batch until it ends, and print its end; exit status 1 unless every line has succeeded."""
    try:
        status = _follow(client, batch_id)
    except KeyboardInterrupt:
        errors.print(
            f"batch {batch_id} is still running; to follow it again: inferq batch status {batch_id} --follow",
            soft_wrap=True,
        )
        raise
    if out is not None:
        client.batch_file(batch_id, "output", out)
        client.batch_file(batch_id, "errors", out)
    if as_json:
        print_json(status)
    else:
        _show(status)
    if status.state != "completed" or status.counts.succeeded != status.counts.total:
        raise typer.Exit(1)


def _follow(client: Client, batch_id: str) -> BatchStatus:
    return _with_bar(client, batch_id) if errors.is_terminal else _with_lines(client, batch_id)


def _with_bar(client: Client, batch_id: str) -> BatchStatus:
    with Progress(
        TextColumn("{task.fields[state]:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    ) as bars:
        bar = bars.add_task("", total=None, state="queued", note="")
        for status in _looks(client, batch_id):
            counts = status.counts
            bars.update(
                bar,
                total=counts.total,
                completed=counts.done,
                state=status.state,
                note=_note(status),
            )
    return status


def _with_lines(client: Client, batch_id: str) -> BatchStatus:
    """Progress for a pipe or a log: a line when the state changes, and one every `_LINE_SECONDS`."""
    printed, at = "", 0.0
    for status in _looks(client, batch_id):
        now = time.monotonic()
        if status.state != printed or now - at >= _LINE_SECONDS:
            counts = status.counts
            done = "/".join("?" if count is None else str(count) for count in (counts.done, counts.total))
            errors.print(f"{status.state} {done} {_note(status)}", soft_wrap=True)
            printed, at = status.state, now
    return status


def _looks(client: Client, batch_id: str, *, pause: float = _LOOK_SECONDS) -> Iterator[BatchStatus]:
    """Poll the batch until it has ended. If the gateway is unavailable, keep polling."""
    unavailable = False
    while True:
        try:
            status = client.batch(batch_id)
        except Unavailable as error:
            if not unavailable:
                errors.print(
                    f"{error}; the batch keeps running; waiting until the gateway answers", soft_wrap=True
                )
            unavailable = True
        else:
            unavailable = False
            yield status
            if status.ended:
                return
        time.sleep(pause)


def _note(status: BatchStatus) -> str:
    counts = status.counts
    parts = ["recounting" if counts.failed is None else f"{counts.failed} failed"]
    if counts.invalid:
        parts.append(f"{counts.invalid} invalid")
    if counts.cancelled:
        parts.append(f"{counts.cancelled} cancelled")
    if counts.cached:
        parts.append(f"{counts.cached} from the cache")
    if status.rate is not None:
        parts.append(f"{status.rate:.1f}/s")
    if status.seconds_left is not None and not status.ended:
        parts.append(f"{duration_text(status.seconds_left)} left")
    return ", ".join(parts)


def _show(status: BatchStatus) -> None:
    counts = status.counts
    rows: list[tuple[str, object]] = [
        ("batch", status.batch_id),
        ("state", "will be cancelled" if status.cancel_requested and not status.ended else status.state),
        ("source", status.source),
        ("total", counts.total),
        ("queued", counts.queued),
        ("running", counts.running),
        ("succeeded", counts.succeeded),
        ("failed", counts.failed),
        ("cancelled", counts.cancelled),
        ("invalid", counts.invalid),
    ]
    if counts.cached:
        rows.append(("from the cache", counts.cached))
    if status.rate is not None:
        rows.append(("rate", f"{status.rate:.1f}/s"))
    if status.seconds_left is not None and not status.ended:
        rows.append(("time left", duration_text(status.seconds_left)))
    if status.error:
        rows.append(("error", status.error))
    print_table(["", ""], rows)


@app.command()
def status(
    batch_id: BatchId,
    follow: Annotated[bool, typer.Option("--follow", help="Show its progress until it ends.")] = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a batch's state and counts. With --follow, exit status 1 unless every line has succeeded."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with Client() as client:
        found = client.batch(batch_id)
        if follow or out:
            _finish(client, batch_id, out, as_json)
            return
    if as_json:
        print_json(found)
    else:
        _show(found)


@app.command()
def cancel(batch_id: BatchId, as_json: JsonFlag = False) -> None:
    """Cancel a batch: queued tasks do not start, running ones stop. Its files are then written."""
    with Client() as client:
        found = client.cancel_batch(batch_id)
    if as_json:
        print_json(found)
    else:
        what = "cancelled" if found.ended else "will be cancelled"
        console.print(f"{found.batch_id}: {what}")


@app.command()
def output(
    batch_id: BatchId, out: Annotated[Path | None, typer.Option("--out", help="A file or folder.")] = None
) -> None:
    """Print the results of the lines that succeeded, one JSON object a line."""
    _file(batch_id, "output", out)


@app.command("errors")
def errors_(batch_id: BatchId, out: Into = None) -> None:
    """Print the lines that failed, were cancelled or were invalid, one JSON object a line."""
    _file(batch_id, "errors", out)


def _file(batch_id: str, name: Literal["output", "errors"], out: Path | None) -> None:
    with Client() as client:
        try:
            if out is not None:
                client.batch_file(batch_id, name, out)
                return
            with tempfile.TemporaryDirectory(prefix="inferq-batch-") as folder:
                path = client.batch_file(batch_id, name, Path(folder))
                with path.open("rb") as file:
                    shutil.copyfileobj(file, sys.stdout.buffer)
        except NotEnded as error:
            complain(error)
            raise typer.Exit(1) from error


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="The most batches to list.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List batches, the newest first."""
    with Client() as client:
        found = list(islice(client.batches(page_size=min(limit, 50)), limit))
    if as_json:
        print_json(found)
        return
    print_table(
        ["batch", "state", "total", "succeeded", "failed", "invalid", "created"],
        [
            (
                b.batch_id, b.state, b.counts.total, b.counts.succeeded, b.counts.failed, b.counts.invalid,
                b.created_at,
            )
            for b in found
        ],
    )  # fmt: skip
