"""inferq submit, status, result, cancel and list: a user's tasks, through the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import JsonValue
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from inferq.producer.cli.arguments import bundle, parse_assignments
from inferq.producer.cli.output import JsonFlag, complain, console, errors, print_json, print_table
from inferq.producer.client.sync_client import Client
from inferq.schemas import InvalidTask, Priority, Result, State, TaskStatus, get_type, tracing

app = typer.Typer()

_LABEL_CHARACTERS = 60
"""The most characters shown of an input, which may be a long text."""

_SET_OTHERWISE = {
    "task_id": "--id",
    "task_type": "TYPE",
    "priority": "--priority",
    "callback_url": "--callback",
}
"""Fields with an argument or option of their own."""

TaskId = Annotated[str, typer.Argument(metavar="ID")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Wait for the end, and save results and artifacts below this folder."),
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
    task_id: Annotated[str | None, typer.Option("--id", help="Your own id, for a single task.")] = None,
    callback: Annotated[
        str | None, typer.Option(metavar="URL", help="A URL to notify when a task ends.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and print the result.")] = False,
    out: Out = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit tasks; files among the inputs are uploaded. Exit status 1 if a task fails.

    --set takes a field of the task or, if the task has no such field, one of its options. The value is read
    as JSON, or else as text:  inferq submit ocr page.png --set annotated=true --wait
    """
    chosen = get_type(task_type)
    if priority not in get_args(Priority):
        raise InvalidTask(f"--priority {priority!r} is not one of {', '.join(get_args(Priority))}")
    fields = parse_assignments(chosen, assignments or [])
    for name in _SET_OTHERWISE.keys() & fields:
        raise InvalidTask(f"--set {name}: give {_SET_OTHERWISE[name]} instead")
    bundles = bundle(chosen, inputs or [], given=fields)
    if task_id is not None and len(bundles) > 1:
        raise InvalidTask(f"--id names one task, but these inputs make {len(bundles)} tasks; leave out --id")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before the upload, so that an error costs nothing
    printed_at_once = not (wait or out or as_json)
    submitted: list[TaskStatus] = []
    labels: dict[str, str] = {}
    with (
        tracing.exporting("cli", required=False),
        tracing.span("inferq submit", "client"),
        Client() as client,
        _accepted_printed_on_error({} if printed_at_once else labels),
    ):
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
            if printed_at_once:
                console.print(submitted[-1].task_id)
        if wait or out:
            _finish(client, labels, out, as_json)
        elif as_json:
            print_json(submitted)


@contextmanager
def _accepted_printed_on_error(accepted: Mapping[str, object]) -> Iterator[None]:
    """If an error or Ctrl-C ends the block, print the ids of the accepted tasks: they still run."""
    try:
        yield
    except typer.Exit:  # all tasks have ended; this reports that one failed
        raise
    except BaseException:
        if accepted:
            errors.print(f"accepted already, and still running: {' '.join(accepted)}", soft_wrap=True)
        raise


def _split(fields: dict[str, JsonValue]) -> tuple[dict[str, JsonValue] | None, dict[str, Any]]:
    options = fields.get("options")
    rest = {name: value for name, value in fields.items() if name != "options"}
    return (options if isinstance(options, dict) else None), rest


def _finish(client: Client, labels: Mapping[str, str], out: Path | None, as_json: bool) -> None:
    """Wait for tasks, and print their results. `labels` gives the inputs of each id."""
    results: list[Result] = []
    try:
        for task_id, label in labels.items():
            _follow(client, task_id, label)
            result = client.result(task_id, wait=30)
            results.append(result)
            if out is not None:
                _save(client, result, out)
    finally:  # print the results so far even if one task raises
        if as_json:
            print_json(results)
        else:
            for result in results:
                _show(result, labels[result.task_id])
    if any(result.status != "succeeded" for result in results):
        raise typer.Exit(1)


def _follow(client: Client, task_id: str, label: str) -> None:
    """Show the task's progress until it ends, on standard error and only if that is a terminal."""
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
    folder = out / result.task_id.replace("..", "%2E%2E")  # an id may consist of dots alone
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
    console.print(shown, soft_wrap=True)
    for artifact in result.artifacts:
        console.print(f"{artifact.name}: {artifact.url}", soft_wrap=True)


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
        console.print(f"{found.task_id}: {'cancelled' if found.ended else 'will be cancelled'}")


@app.command("list")
def list_(
    task_type: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    state: Annotated[str | None, typer.Option("--status", help="Only in this state.")] = None,
    batch_id: Annotated[str | None, typer.Option("--batch", help="Only of this batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most tasks to list.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List tasks, the newest first."""
    if state is not None and state not in get_args(State):
        raise InvalidTask(f"--status {state!r} is not one of {', '.join(get_args(State))}")
    with Client() as client:
        pages = client.list(task_type=task_type, status=state, batch_id=batch_id)  # type: ignore[arg-type]
        found = list(islice(pages, limit))
    if batch_id is not None:
        errors.print(
            "only the running tasks of a batch are listed; for those that ended: "
            f"inferq batch output {batch_id}, inferq batch errors {batch_id}",
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
