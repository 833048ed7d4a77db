"""inferq plan: how many workers a load needs, how long it takes and what it costs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from inferq.producer.capacity import (
    Capacity,
    Measured,
    Plan,
    parse_number,
    parse_rate,
    parse_share,
    parse_span,
)
from inferq.producer.cli.output import JsonFlag, console, print_json, print_table
from inferq.schemas import InstallationError, InvalidTask

app = typer.Typer()

_TIMEOUT_SECONDS = 10.0
_BENCHMARK = re.compile(
    r"^## (?P<type>\w+), (?P<unit>\w+) per second:(?:(?!^## ).)*?"
    r"^\| inferq, queue to stored result \| (?P<rate>[0-9.,]+) \|",
    re.MULTILINE | re.DOTALL,
)
"""A part of benchmarks/RESULTS.md: what one slot of a worker did in a second."""


@app.command()
def plan(
    rate: Annotated[str | None, typer.Option(help="Steady load, such as 5/s or 300/min.")] = None,
    tasks: Annotated[int | None, typer.Option(help="The tasks of a batch.")] = None,
    within: Annotated[str | None, typer.Option(help="How long the batch may take: 8h.")] = None,
    by: Annotated[str | None, typer.Option(help="When it has to end: 2026-11-26T06:00+01:00.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead: the number of workers.")] = None,
    waiting: Annotated[
        bool,
        typer.Option(
            "--waiting",
            help="For the tasks that wait now, by the gateway's figures. --within: the longest wait (default 5m).",
        ),
    ] = False,
    seconds: Annotated[str | None, typer.Option(help="Seconds per task.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Or: /metrics of a worker, as a URL or a saved file; several times for several."),
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="Or: a file that `make bench` wrote. A task is then a page or a text.")
    ] = None,
    task_type: Annotated[
        str | None, typer.Option("--type", help="The task type, if several were measured.")
    ] = None,
    reserve: Annotated[str, typer.Option(help="The share of a worker's time to keep free.")] = "20%",
    slots: Annotated[int, typer.Option(help="Tasks that a worker runs at a time.")] = 1,
    price: Annotated[str | None, typer.Option(help="Price of one GPU hour.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Work out workers, GPU hours and cost for a load.

    Give a --rate, or --tasks with --within, --by or --workers. With --waiting, print the workers that each type needs.
    """
    if waiting:
        if any(given is not None for given in (rate, tasks, by, workers, seconds, metrics, benchmark, price)):
            raise InvalidTask("--waiting goes with --within, --type and --json alone")
        _plan_waiting(None if within is None else float(parse_span("--within", within)), task_type, as_json)
        return
    capacity = Capacity(
        _measured(seconds, metrics or [], benchmark, task_type),
        slots,
        parse_share("--reserve", reserve),
        None if price is None else parse_number("--price", price),
    )
    made = _plan(capacity, rate, tasks, within, by, workers)
    if as_json:
        print_json(_facts(made, capacity.measured))
    else:
        print_table(["", "", ""], [[step.name, step.value, step.how] for step in made.steps])


def _plan_waiting(target_wait: float | None, task_type: str | None, as_json: bool) -> None:
    from inferq.producer.client.sync_client import Client

    with Client() as client:
        demand = client.demand(target_wait=target_wait)
    if task_type is not None:
        _one_of(demand.types, task_type, "; ".join(demand.unknown.values()) or "no task type is known")
        demand = demand.model_copy(update={"types": {task_type: demand.types[task_type]}})
    if as_json:
        # With nulls: an unknown figure must not look like one that does not exist.
        print_json(demand.model_dump(mode="json"))
        return
    columns = ["type", "workers", "ready", "in hand", "to feed", "oldest", "seconds per task"]
    rows = [
        [
            name,
            *map(
                _shown,
                (each.workers, each.ready, each.unacked, each.unfed, each.oldest_seconds, each.task_seconds),
            ),
        ]
        for name, each in demand.types.items()
    ]
    print_table(columns, rows)
    for name, reason in demand.unknown.items():
        console.print(f"?  {name}: {reason}", soft_wrap=True)


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:,g}"


def _plan(
    capacity: Capacity,
    rate: str | None,
    tasks: int | None,
    within: str | None,
    by: str | None,
    workers: int | None,
) -> Plan:
    ends = [option is not None for option in (within, by, workers)]
    if rate is not None:
        if tasks is not None or any(ends):
            raise InvalidTask("--rate is for a steady load: leave out the options of a batch")
        return capacity.for_rate(parse_rate("--rate", rate))
    if tasks is None or sum(ends) != 1:
        raise InvalidTask("give a --rate, or --tasks with one of --within, --by and --workers")
    if workers is not None:
        return capacity.for_batch(tasks, workers=workers)
    window = parse_span("--within", within) if within is not None else _until(by or "")
    return capacity.for_batch(tasks, within=window)


def _until(by: str) -> Fraction:
    try:
        moment = datetime.fromisoformat(by)
    except ValueError as error:
        raise InvalidTask(f"--by {by!r} is not a date and time; write 2026-11-26T06:00+01:00") from error
    left = int((moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    if left <= 0:
        raise InvalidTask(f"--by {by!r} is in the past")
    return Fraction(left)


def _facts(made: Plan, measured: Measured) -> dict[str, object]:
    def number(value: Fraction | None) -> float | None:
        return None if value is None else float(value)

    return {
        "seconds_per_task": number(measured.seconds),
        "source": measured.source,
        "workers": made.workers,
        "seconds": number(made.seconds),
        "gpu_hours": number(made.gpu_hours),
        "cost": number(made.cost),
        "cost_per_1000_tasks": number(made.cost_per_1000),
        "steps": [{"name": step.name, "value": step.value, "how": step.how} for step in made.steps],
    }


# Where the seconds per task come from.


def _measured(
    seconds: str | None, metrics: Sequence[str], benchmark: Path | None, task_type: str | None
) -> Measured:
    if [seconds is not None, bool(metrics), benchmark is not None].count(True) != 1:
        raise InvalidTask("give one of --seconds, --metrics and --benchmark")
    if seconds is not None:
        return Measured({"given": parse_number("--seconds", seconds)}, "given")
    if benchmark is not None:
        return _from_benchmark(benchmark, task_type)
    return measured_of([_page(source) for source in metrics], task_type, ", ".join(metrics))


def _from_benchmark(path: Path, task_type: str | None) -> Measured:
    found = {part["type"].lower(): part for part in _BENCHMARK.finditer(path.read_text("utf-8", "replace"))}
    name = _one_of(found, task_type, f"{path} has no rate of a worker; give a file that `make bench` wrote")
    part = found[name]
    rate = parse_number(f"{path}:", part["rate"].replace(",", ""))
    if not rate:
        raise InvalidTask(f"{path} has a rate of 0 for {name!r}; run the benchmark again")
    how = f"1 / {part['rate']} {part['unit']}/s of one slot ({path}); a task is one of the {part['unit']}"
    return Measured({"measured": 1 / rate}, how)


def _page(source: str) -> str:
    """The text of a page of metrics. Raises InvalidTask."""
    if not source.startswith(("http://", "https://")):
        return Path(source).read_text("utf-8", "replace")
    import httpx

    try:
        answer = httpx.get(source, timeout=_TIMEOUT_SECONDS)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InvalidTask(
            f"--metrics {source}: {str(error) or type(error).__name__}; give the /metrics of a worker, on its "
            "INFERQ_PROBE_PORT"
        ) from error
    return answer.text


def measured_of(pages: Sequence[str], task_type: str | None, source: str) -> Measured:
    """What the workers that have these pages measured: seconds of their slots, but for waits for a task, per task."""
    tasks: dict[str, Fraction] = defaultdict(Fraction)
    parts: dict[str, dict[str, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for page in pages:
        for name, labels, value in _samples(page):
            kind = labels.get("task_type", "")
            if name == "inferq_worker_tasks_total" and labels.get("outcome") in ("succeeded", "failed"):
                tasks[kind] += value
            elif name == "inferq_engine_busy_seconds_total":
                parts[kind]["computing"] += value
            elif name == "inferq_engine_waiting_seconds_total" and labels.get("for") != "task":
                parts[kind][f"waiting for the {labels.get('for')}"] += value
    known = {kind: count for kind, count in tasks.items() if count and parts.get(kind)}
    kind = _one_of(known, task_type, f"{source}: no task has ended on these workers since they started")
    each = {name: spent / known[kind] for name, spent in parts[kind].items()}
    ended = f"{int(known[kind]):,} task{'' if known[kind] == 1 else 's'}"
    return Measured(each, f"mean of the {ended} of type {kind} that ended ({source})")


def _samples(page: str) -> Iterator[tuple[str, dict[str, str], Fraction]]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise InstallationError(
            f"--metrics needs a package that is not installed ({error}); run: pip install 'inferq[worker]'"
        ) from error
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                yield sample.name, sample.labels, Fraction(sample.value)
    except (ValueError, OverflowError, KeyError, IndexError) as error:
        raise InvalidTask(f"--metrics: this is no page of Prometheus metrics: {error}") from error


def _one_of(found: Mapping[str, object], wanted: str | None, none: str) -> str:
    """The task type to take. Raises InvalidTask if it is not there, or not clear."""
    if not found:
        raise InvalidTask(none)
    if wanted is None and len(found) == 1:
        return next(iter(found))
    if wanted is None or wanted not in found:
        what = "give --type" if wanted is None else f"--type {wanted!r} was not measured"
        raise InvalidTask(f"{what}; there are measurements of: {', '.join(sorted(found))}")
    return wanted
