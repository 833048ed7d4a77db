"""inferq submit, status, result, cancel, list: what a user does with tasks, through the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import JsonValue
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from inferq.producer.cli.arguments import bundle, parse_assignments
from inferq.producer.cli.output import JsonFlag, complain, console, errors, print_json, print_table
from inferq.producer.client.sync_client import Client
from inferq.schemas import InvalidTask, Priority, Result, State, TaskStatus, get_type

app = typer.Typer()

_LABEL_CHARACTERS = 60
"""The most that is shown of an input, which may be a long text."""

_SET_OTHERWISE = {
    "task_id": "--id",
    "task_type": "TYPE",
    "priority": "--priority",
    "callback_url": "--callback",
}
"""Fields that have a place of their own on the command line."""

TaskId = Annotated[str, typer.Argument(metavar="ID")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Wait, and save results and artifacts below this folder.")
]


@app.command()
def submit(
    task_type: Annotated[str, typer.Argument(metavar="TYPE", help="The task type, e.g. ocr.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE|URL|TEXT]...", help="The inputs, one task for each.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="A field or an option of the task.")
    ] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    task_id: Annotated[str | None, typer.Option("--id", help="An id of your own, for a single task.")] = None,
    callback: Annotated[str | None, typer.Option(metavar="URL", help="Where to notify of the end.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and print the result.")] = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit tasks; files among the inputs are uploaded. Exit status 1 if a task fails.

    --set takes a field of the task or, where there is no such field, one of its options; the value is read
    as JSON, else as text:  inferq submit ocr page.png --set annotated=true --wait
    """
    chosen = get_type(task_type)
    if priority not in get_args(Priority):
        raise InvalidTask(f"--priority {priority!r} is none of {', '.join(get_args(Priority))}")
    fields = parse_assignments(chosen, assignments or [])
    for name in _SET_OTHERWISE.keys() & fields:
        raise InvalidTask(f"--set {name}: give {_SET_OTHERWISE[name]} instead")
    bundles = bundle(chosen, inputs or [], given=fields)
    if task_id is not None and len(bundles) > 1:
        raise InvalidTask(f"--id names one task, and these inputs make {len(bundles)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # while there is nothing to lose yet
    told_at_once = not (wait or out or as_json)
    submitted: list[TaskStatus] = []
    labels: dict[str, str] = {}
    with Client() as client, _told_if_cut_short({} if told_at_once else labels):
        for parts in bundles:
            options, rest = _split(fields | {name: part.value(client) for name, part in parts.items()})
            submitted.append(
                client.submit(
                    chosen.name,
                    task_id=task_id,
                    priority=priority,  # type: ignore[arg-type] # checked above
                    callback_url=callback,
                    options=options,
                    **rest,
                )
            )
            labels[submitted[-1].task_id] = " ".join(part.text for part in parts.values())
            if told_at_once:
                console.print(submitted[-1].task_id, markup=False, highlight=False)
        if wait or out:
            _finish(client, labels, out, as_json)
        elif as_json:
            print_json(submitted)


@contextmanager
def _told_if_cut_short(accepted: Mapping[str, object]) -> Iterator[None]:
    """Tells the ids of what has been accepted when an error or Ctrl-C comes after that: it goes on."""
    try:
        yield
    except typer.Exit:  # nothing was cut short: this is how failed tasks are told
        raise
    except BaseException:
        if accepted:
            errors.print(
                f"accepted before that, and going on: {' '.join(accepted)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        raise


def _split(fields: dict[str, JsonValue]) -> tuple[dict[str, JsonValue] | None, dict[str, Any]]:
    options = fields.get("options")
    rest = {name: value for name, value in fields.items() if name != "options"}
    return (options if isinstance(options, dict) else None), rest


def _finish(client: Client, labels: Mapping[str, str], out: Path | None, as_json: bool) -> None:
    """Wait for tasks; `labels` says of each id which inputs it was given."""
    results: list[Result] = []
    try:
        for task_id, label in labels.items():
            _follow(client, task_id, label)
            result = client.result(task_id, wait=30)
            results.append(result)
            if out is not None:
                _save(client, result, out)
    finally:  # an error at one of them must not cost those that are there
        if as_json:
            print_json(results)
        else:
            for result in results:
                _show(result, labels[result.task_id])
    if any(result.status != "succeeded" for result in results):
        raise typer.Exit(1)


def _follow(client: Client, task_id: str, label: str) -> None:
    """Show the task's progress until its end; on standard error, and only where a person sees it."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bars:
        bar = bars.add_task(_short(label) or task_id, total=1.0, note="queued")
        for event in client.events(task_id):
            note = event.data.note or event.data.state
            bars.update(bar, completed=event.data.progress or 0.0, note=note)


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[:_LABEL_CHARACTERS]}…"


def _save(client: Client, result: Result, out: Path) -> None:
    folder = out / result.task_id.replace("..", "%2E%2E")  # an id may be nothing but dots
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(result.model_dump_json(indent=2, exclude_none=True), "utf-8")
    for artifact in result.artifacts:
        client.download(result.task_id, artifact.name, folder / Path(artifact.name).name)


def _show(result: Result, label: str = "") -> None:
    name = f"{_short(label)} ({result.task_id})" if label else result.task_id
    if result.error is not None:
        complain(f"{name} {result.status} ({result.error.code}): {result.error.message}")
        return
    text = result.output.get("text") if isinstance(result.output, dict) else None
    shown = text if isinstance(text, str) else json.dumps(result.output, ensure_ascii=False, indent=2)
    console.rule(Text(name))
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
    for artifact in result.artifacts:
        console.print(f"{artifact.name}: {artifact.url}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def status(task_id: TaskId, as_json: JsonFlag = False) -> None:
    """Show where a task stands."""
    with Client() as client:
        found = client.status(task_id)
    if as_json:
        print_json(found)
    else:
        rows = found.model_dump(exclude_none=True)
        if found.error is not None:
            rows["error"] = f"{found.error.code}: {found.error.message}"
        print_table(["", ""], rows.items())


@app.command()
def result(
    task_id: TaskId,
    wait: Annotated[float | None, typer.Option(help="Seconds to wait for the end.")] = None,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Print how a task ended. Exit status 1 if it failed, or has not ended."""
    with Client() as client:
        found = client.result(task_id, wait=wait)
        if out is not None:
            _save(client, found, out)
    if as_json:
        print_json(found)
    else:
        _show(found)
    if found.status != "succeeded":
        raise typer.Exit(1)


@app.command()
def cancel(task_id: TaskId, as_json: JsonFlag = False) -> None:
    """Cancel a task, queued or running. A queued one never starts; a running one stops in a second or so."""
    with Client() as client:
        found = client.cancel(task_id)
    if as_json:
        print_json(found)
    else:
        console.print(f"{found.task_id}: {'cancelled' if found.ended else 'will be cancelled'}", markup=False)


@app.command("list")
def list_(
    task_type: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    state: Annotated[str | None, typer.Option("--status", help="Only in this state.")] = None,
    batch_id: Annotated[str | None, typer.Option("--batch", help="Only of this batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List tasks, the newest first."""
    if state is not None and state not in get_args(State):
        raise InvalidTask(f"--status {state!r} is none of {', '.join(get_args(State))}")
    with Client() as client:
        pages = client.list(task_type=task_type, status=state, batch_id=batch_id)  # type: ignore[arg-type]
        found = list(_first(pages, limit))
    if batch_id is not None:
        errors.print(
            "of a batch's lines only those in a worker's hands are listed; what has ended: "
            f"inferq batch output {batch_id}, inferq batch errors {batch_id}",
            markup=False,
            soft_wrap=True,
        )
    if as_json:
        print_json(found)
        return
    print_table(
        ["task", "type", "state", "attempt", "created", "error"],
        [
            (t.task_id, t.task_type, t.state, t.attempt, t.created_at, t.error.message if t.error else None)
            for t in found
        ],
    )


def _first(tasks: Iterator[TaskStatus], count: int) -> Iterator[TaskStatus]:
    for _, task in zip(range(count), tasks, strict=False):
        yield task
