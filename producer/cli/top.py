"""inferq top: the queues, workers and batches of the installation, live."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from inferq.producer.cli.output import JsonFlag, console, duration_text, print_json, unfolded
from inferq.producer.client.errors import Unavailable
from inferq.producer.client.sync_client import Client
from inferq.schemas import BatchStatus
from inferq.schemas.logs import escape_control
from inferq.schemas.monitor import Lane, QueueFigures, Stats, WorkerInfo, WorkerList

app = typer.Typer()

_TIMEOUT_SECONDS = 5.0
_BATCHES = 10
"""The newest batches that are looked at."""
_TASKS = 2
"""The ids of tasks that a worker's row has."""
_UNKNOWN = "?"
_STYLES = {"idle": "green", "busy": "cyan", "paused": "yellow", "loading": "magenta"}
_GIB = 1024**3


@dataclass(frozen=True)
class Reading:
    """What the gateway answered. `batches` are the newest of the caller's tenant that have not ended."""

    stats: Stats
    workers: WorkerList
    batches: Sequence[BatchStatus] = ()


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print the figures once, then exit.")] = False,
    as_json: JsonFlag = False,
    interval: Annotated[float, typer.Option(min=0.5, max=60, help="Seconds between two readings.")] = 2.0,
) -> None:
    """Show queues, workers and batches live, until Ctrl-C.

    The figures come from `inferq monitor`. Unknown figures are `?`. Counts include all tenants; task ids and batches
    are your tenant's. With --json, or into a pipe, it prints once.
    """
    if once or as_json or not console.is_terminal:
        with Client() as client:
            reading = read(client)
        if as_json:
            # With nulls: an unknown figure must not look like one that does not exist.
            print_json({name: _document(part) for name, part in vars(reading).items()})
        else:
            unfolded().print(view(reading, {}))
        return
    with Client(timeout=_TIMEOUT_SECONDS, retries=0) as client:
        _follow(client, interval)


def _document(part: object) -> object:
    if isinstance(part, Stats | WorkerList | BatchStatus):
        return part.model_dump(mode="json")
    return [_document(each) for each in part] if isinstance(part, list | tuple) else part


def read(client: Client) -> Reading:
    """The figures now. Raises ApiError."""
    newest = islice(client.batches(page_size=_BATCHES), _BATCHES)
    batches = tuple(batch for batch in newest if not batch.ended)
    return Reading(client.stats(), client.workers(), batches)


def _follow(client: Client, interval: float) -> None:
    rates = Rates()
    screen: RenderableType = Text("reading …")
    with Live(screen, console=console, screen=True, auto_refresh=False) as live:
        try:
            for shown in _screens(client, rates):
                live.update(shown, refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            return


def _screens(client: Client, rates: Rates) -> Iterator[RenderableType]:
    """One picture after another. While the gateway is unavailable, the last figures with what is wrong."""
    last: Reading | None = None
    while True:
        try:
            last = read(client)
        except Unavailable as error:
            trouble = Text(f"{escape_control(str(error))}; still trying", style="bold red")
            yield trouble if last is None else Group(trouble, Text(), view(last, rates.last))
        else:
            yield view(last, rates.after(last.stats))


class Rates:
    """Tasks per second of each lane, from what workers took between two rounds of the monitor."""

    def __init__(self) -> None:
        self._before: tuple[datetime, dict[Lane, int]] | None = None
        self.last: Mapping[Lane, float] = {}

    def after(self, stats: Stats) -> Mapping[Lane, float]:
        """The rates, with this reading as the newest. Until a second round, they are unknown."""
        at = (stats.read_at or {}).get("redis", stats.at)
        if at is None or stats.queues is None:
            return self.last
        taken = {(q.task_type, q.priority): q.taken for q in stats.queues if q.taken is not None}
        before = self._before
        if before is not None and at <= before[0]:
            return self.last
        if before is not None:
            seconds = (at - before[0]).total_seconds()
            self.last = {
                lane: (count - before[1][lane]) / seconds
                for lane, count in taken.items()
                if lane in before[1] and count >= before[1][lane]
            }
        self._before = at, {lane: count for lane, count in taken.items() if count is not None}
        return self.last


def view(reading: Reading, rates: Mapping[Lane, float]) -> RenderableType:
    """The picture of one reading."""
    stats = reading.stats
    parts: list[RenderableType] = [_heading(stats), Text(), _queues(stats, rates), Text(), _rest(stats)]
    parts += [Text(), _workers(reading.workers)]
    if reading.batches:
        parts += [Text(), _batches(reading.batches)]
    reasons = dict.fromkeys(stats.unknown.values())
    if reading.workers.unknown is not None:
        reasons[reading.workers.unknown] = None
    parts += [Text()] if reasons else []
    parts += [Text(f"{_UNKNOWN}  {escape_control(reason)}", style="yellow") for reason in reasons]
    return Group(*parts)


def _heading(stats: Stats) -> Text:
    at = "no figures" if stats.at is None else f"{stats.at.astimezone():%Y-%m-%d %H:%M:%S}"
    line = Text.assemble(("inferq ", "bold"), at)
    for name, up in (stats.services or {}).items():
        line.append(f"   {name} ")
        line.append("up" if up else "unavailable", "green" if up else "bold red")
    for kind in stats.alarms or ():
        line.append(f"   {kind} alarm: RabbitMQ accepts no tasks", "bold red")
    return line


def _table(*columns: tuple[str, bool]) -> Table:
    """A table without lines; a column is its name, and whether it holds numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, numbers in columns:
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    return table


def _queues(stats: Stats, rates: Mapping[Lane, float]) -> RenderableType:
    if stats.queues is None:
        return Text("queues  ?")
    table = _table(
        ("type", False), ("priority", False), ("ready", True), ("in hand", True), ("oldest", True), ("tasks/s", True),
        ("consumers", True), ("dead letters", True),
    )  # fmt: skip
    dead = stats.dead_letters or {}
    shown: set[str] = set()
    for lane in stats.queues:
        first = lane.task_type not in shown
        if not _is_used(lane) and not (first and dead.get(lane.task_type)):
            continue
        shown.add(lane.task_type)
        rate = rates.get((lane.task_type, lane.priority))
        table.add_row(
            lane.task_type if first else "",
            lane.priority,
            _count(lane.ready),
            _count(lane.unacked),
            _duration(lane.oldest_seconds),
            Text("") if rate is None else Text(f"{rate:.1f}"),
            _count(lane.consumers),
            _count(dead.get(lane.task_type)) if first else "",
        )
    return table if shown else Text("no tasks wait, and no workers consume")


def _is_used(lane: QueueFigures) -> bool:
    figures = (lane.ready, lane.unacked, lane.consumers)
    return any(figures) or (None in figures and lane.ready is not None)


def _rest(stats: Stats) -> RenderableType:
    waiting, given_up = _count(stats.callbacks_waiting), _count(stats.callbacks_given_up)
    callbacks = Text.assemble(waiting, " waiting, ", given_up, " given up")
    lines = [
        ("retries", _counts(stats.retry_messages, " at ")),
        ("unroutable", _count(stats.unroutable_messages)),
        ("callbacks", callbacks),
        ("batches", _counts(stats.batches)),
        ("nights", _counts(stats.nights)),
    ]  # fmt: skip
    late = [night for night in stats.late_nights or () if night.seconds > 0]
    if late:
        names = ", ".join(f"{night.schedule} by {duration_text(night.seconds)}" for night in late)
        lines.append(("late", Text(escape_control(names), style="bold red")))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for name, text in lines:
        table.add_row(name, text)
    return table


def _workers(found: WorkerList) -> RenderableType:
    if found.items is None:
        return Text("workers  ?")
    if not found.items:
        return Text("no workers")
    table = _table(
        ("worker", False), ("type", False), ("state", False), ("busy", True), ("tasks", False), ("engine", False),
        ("GPU", True), ("version", False),
    )  # fmt: skip
    for worker in found.items:
        table.add_row(
            _plain(worker.name),
            _plain(worker.task_type),
            _state(worker),
            f"{worker.busy}/{worker.slots}",
            _tasks(worker),
            _engine(worker),
            _gpu(worker),
            _plain(worker.version),
        )
    return table


def _state(worker: WorkerInfo) -> Text:
    text = Text(worker.state, style=_STYLES[worker.state])
    if worker.paused_for:
        text.append(f" for {escape_control(', '.join(worker.paused_for))}")
    return text


def _tasks(worker: WorkerInfo) -> Text:
    ids = [task.task_id for task in worker.tasks]
    others = sum(worker.in_hand.values()) - min(len(ids), _TASKS)
    parts = ids[:_TASKS] + ([f"and {others} more" if ids else f"{others}"] if others > 0 else [])
    return _plain(", ".join(parts))


def _engine(worker: WorkerInfo) -> Text:
    engine = worker.engine
    return Text("") if engine is None else _plain(f"{engine.model} on {engine.device}")


def _gpu(worker: WorkerInfo) -> Text:
    gpus = worker.gpus or ()
    return _plain(", ".join(f"{gpu.used_bytes / _GIB:.1f}/{gpu.total_bytes / _GIB:.0f} GiB" for gpu in gpus))


def _batches(batches: Sequence[BatchStatus]) -> Table:
    table = _table(
        ("batch", False), ("state", False), ("done", True), ("total", True), ("tasks/s", True), ("left", True)
    )
    for batch in batches:
        table.add_row(
            _plain(batch.batch_id),
            batch.state,
            _count(batch.counts.done),
            _count(batch.counts.total),
            Text("") if batch.rate is None else Text(f"{batch.rate:.1f}"),
            Text("") if batch.seconds_left is None else Text(duration_text(batch.seconds_left)),
        )
    return table


def _counts(counts: Mapping[Any, int] | None, between: str = " ") -> Text:
    if counts is None:
        return _count(None)
    text = ", ".join(f"{count:,}{between}{name}" for name, count in counts.items() if count)
    return Text(text or "none")


def _count(number: int | None) -> Text:
    return Text(_UNKNOWN, style="yellow") if number is None else Text(f"{number:,}")


def _duration(seconds: float | None) -> Text:
    return _count(None) if seconds is None else Text(duration_text(seconds))


def _plain(text: str) -> Text:
    """Text of others, whose control characters a terminal must not execute."""
    return Text(escape_control(text))
