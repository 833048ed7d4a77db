"""inferq batch: many tasks from a JSONL file, a folder, globs or an s3:// prefix, through the gateway."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from pydantic import JsonValue
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from inferq.producer.batch.checks import check_files, check_lines
from inferq.producer.cli.arguments import parse_assignments
from inferq.producer.cli.files import files_of, uploaded
from inferq.producer.cli.output import JsonFlag, complain, console, errors, print_json, print_table
from inferq.producer.client.errors import NotEnded, NotFound, Unavailable
from inferq.producer.client.sync_client import Client
from inferq.producer.client.transfers import is_batch_url
from inferq.schemas import BatchStatus, InvalidTask, Priority, get_type, new_task_id
from inferq.schemas.batch_source import JSONL_ENDINGS, input_field, is_prefix, line_of

app = typer.Typer(
    name="batch", help="Submit many tasks from one source, and follow them.", no_args_is_help=True
)

_LOOK_SECONDS = 1.0
_LINE_SECONDS = 10.0
"""Between two lines of progress where nobody watches."""

BatchId = Annotated[str, typer.Argument(metavar="ID")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Follow, and save output.jsonl and errors.jsonl in this folder.")
]
Into = Annotated[Path | None, typer.Option("--out", help="Save it as this file, or in this folder.")]


@app.command()
def submit(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="A JSONL file, folders and globs, or s3://bucket/prefix."),
    ],
    task_type: Annotated[
        str | None, typer.Option("--type", help="The task type, where the lines do not say it.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="A field or an option of all tasks; needs --type."),
    ] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    max_in_flight: Annotated[
        int | None, typer.Option(min=1, help="Tasks queued or running at a time, at most.")
    ] = None,
    batch_id: Annotated[str | None, typer.Option("--id", help="An id of your own.")] = None,
    callback: Annotated[str | None, typer.Option(metavar="URL", help="Where to notify of the end.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its progress until its end.")] = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a batch. With --follow or --out, exit status 1 unless every line has succeeded.

    The files of a folder are uploaded, each a task; one that is empty, unreadable or too large is skipped
    and named, as is a folder that cannot be read, with exit status 1 at the end. Ctrl-C while following
    leaves the batch running.
    """
    if priority not in get_args(Priority):
        raise InvalidTask(f"--priority {priority!r} is none of {', '.join(get_args(Priority))}")
    if assignments and task_type is None:
        raise InvalidTask("--set needs --type: what a field is depends on it")
    defaults: dict[str, JsonValue] = {}
    if task_type is not None:
        defaults = parse_assignments(get_type(task_type), assignments or [])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # while there is nothing to lose yet
    name = batch_id or new_task_id()
    given = defaults if task_type is None else {"task_type": task_type, **defaults}
    with Client() as client, _source(client, sources, given, batch_id) as (source, skipped):
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
            errors_or_output.print(status.batch_id, markup=False, highlight=False)
        if skipped:
            complain(f"skipped {skipped} files or folders, which are named above; the batch is of the others")
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
    """What to submit: a URL or a JSONL file as it is, or a JSONL of files that have been uploaded.

    With it comes how many files and folders were skipped.
    `given` is what all tasks have. What cannot work is refused before anything is uploaded.
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
            raise InvalidTask(f"{source!r} is a source by itself: submit it alone")
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
    """Uploaded anew, the same files are other content: better said before they are."""
    with suppress(NotFound):
        client.batch(batch_id)
        raise InvalidTask(
            f"there is a batch {batch_id!r} already, and files can be submitted once under an id: if that is "
            f"this submission, see `inferq batch status {batch_id} --follow`; else choose another --id",
            code="id_conflict",
        )


def _finish(client: Client, batch_id: str, out: Path | None, as_json: bool) -> None:
    """Follow a batch to its end, and say how it ended; exit status 1 unless every line has succeeded."""
    try:
        status = _follow(client, batch_id)
    except KeyboardInterrupt:
        errors.print(
            f"batch {batch_id} goes on; come back with: inferq batch status {batch_id} --follow",
            markup=False,
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
    """Progress for a pipe or a log: a line where the state changes, and every now and then."""
    said, at = "", 0.0
    for status in _looks(client, batch_id):
        now = time.monotonic()
        if status.state != said or now - at >= _LINE_SECONDS:
            counts = status.counts
            done = "/".join("?" if count is None else str(count) for count in (counts.done, counts.total))
            errors.print(
                f"{status.state} {done} {_note(status)}", markup=False, highlight=False, soft_wrap=True
            )
            said, at = status.state, now
    return status


def _looks(client: Client, batch_id: str, *, pause: float = _LOOK_SECONDS) -> Iterator[BatchStatus]:
    """Where the batch stands, on and on until it has ended. A gateway that is away is waited for."""
    away = False
    while True:
        try:
            status = client.batch(batch_id)
        except Unavailable as error:
            if not away:
                errors.print(
                    f"{error}; the batch goes on, and is looked at again until the gateway answers",
                    markup=False,
                    soft_wrap=True,
                )
            away = True
        else:
            away = False
            yield status
            if status.ended:
                return
        time.sleep(pause)


def _note(status: BatchStatus) -> str:
    counts = status.counts
    parts = ["being counted anew" if counts.failed is None else f"{counts.failed} failed"]
    if counts.invalid:
        parts.append(f"{counts.invalid} invalid")
    if counts.cancelled:
        parts.append(f"{counts.cancelled} cancelled")
    if status.rate is not None:
        parts.append(f"{status.rate:.1f}/s")
    if status.seconds_left is not None and not status.ended:
        parts.append(f"{_span(status.seconds_left)} left")
    return ", ".join(parts)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
    if status.rate is not None:
        rows.append(("rate", f"{status.rate:.1f}/s"))
    if status.seconds_left is not None and not status.ended:
        rows.append(("time left", _span(status.seconds_left)))
    if status.error:
        rows.append(("error", status.error))
    print_table(["", ""], rows)


@app.command()
def status(
    batch_id: BatchId,
    follow: Annotated[bool, typer.Option("--follow", help="Show its progress until its end.")] = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Show where a batch stands. With --follow, exit status 1 unless every line has succeeded."""
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
    """Cancel a batch: nothing queued starts, what runs stops, and its files come then."""
    with Client() as client:
        found = client.cancel_batch(batch_id)
    if as_json:
        print_json(found)
    else:
        what = "cancelled" if found.ended else "will be cancelled"
        console.print(f"{found.batch_id}: {what}", markup=False, highlight=False)


@app.command()
def output(
    batch_id: BatchId, out: Annotated[Path | None, typer.Option("--out", help="A file or folder.")] = None
) -> None:
    """Print the results of what succeeded, a JSON object in each line."""
    _file(batch_id, "output", out)


@app.command("errors")
def errors_(batch_id: BatchId, out: Into = None) -> None:
    """Print what failed, was cancelled or was invalid, a JSON object in each line."""
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
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20, as_json: JsonFlag = False
) -> None:
    """List batches, the newest first."""
    with Client() as client:
        found = [
            status for _, status in zip(range(limit), client.batches(page_size=min(limit, 50)), strict=False)
        ]
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
