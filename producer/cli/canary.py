"""inferq canary: whether new code or new weights do as well as the old ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from inferq.producer.canary import Comparison, Estimate, Limits, Verdict, compare, failure_rate, quantile
from inferq.producer.canary_outputs import ANSWERS, outputs_verdict, read_tasks, replay
from inferq.producer.capacity import parse_number, parse_share, parse_span
from inferq.producer.cli.output import JsonFlag, console, duration_text, errors, print_json, print_table
from inferq.producer.client.sync_client import Client
from inferq.schemas import InvalidTask, Priority
from inferq.storage import StatusIndex, StatusOutage, StorageSettings
from inferq.storage.tracks import KEPT_SECONDS, TrackCounts, TrackRecords

app = typer.Typer(name="canary", help="Compare new code or weights with the old ones.", no_args_is_help=True)

EXIT_STATUS: dict[Verdict, int] = {"good": 0, "worse": 3, "unclear": 4}
"""1 and 2 are those of errors."""


@app.command()
def report(
    task_type: Annotated[str, typer.Argument(metavar="TYPE", help="The task type.")],
    since: Annotated[str, typer.Option(help="The time to look at: 90s, 30m, 1h or 2d at most.")] = "1h",
    canary: Annotated[str, typer.Option(help="The track to judge.")] = "canary",
    stable: Annotated[str, typer.Option(help="The track to compare it with.")] = "stable",
    max_failures: Annotated[
        str, typer.Option("--max-more-failures", help="The share of attempts that may fail in addition.")
    ] = "2%",
    max_slowdown: Annotated[str, typer.Option(help="How many times as long its runs may take.")] = "1.25",
    as_json: JsonFlag = False,
) -> None:
    """Compare failures and seconds of two tracks.

    The figures are those of attempts of workers with INFERQ_TRACK. They come from Redis, which keeps them for two
    days. The verdict has a confidence of 95 %.

    Exit status: 0 if the canary is as good, 3 if it is worse, 4 if that is unclear, 1 if the figures are unknown.
    """
    seconds = float(parse_span("--since", since))
    if not 0 < seconds <= KEPT_SECONDS:
        raise InvalidTask(f"--since {since!r} must be from 1s to {duration_text(KEPT_SECONDS)}")
    limits = Limits(
        float(parse_share("--max-more-failures", max_failures)),
        float(parse_number("--max-slowdown", max_slowdown)),
    )
    tracks = _tracks(task_type, seconds)
    made = compare(tracks.get(canary, TrackCounts()), tracks.get(stable, TrackCounts()), limits)
    if as_json:
        print_json(_facts(task_type, seconds, canary, stable, made))
    else:
        _print(canary, stable, made)
        if unnamed := [name for name in (canary, stable) if name not in tracks]:
            known = ", ".join(sorted(tracks)) or "none"
            console.print(
                f"no attempts of {' and '.join(map(repr, unnamed))} in the last {duration_text(seconds)}. Tracks with "
                f"attempts: {known}. INFERQ_TRACK of the workers sets their track."
            )
    if made.verdict != "good":
        raise typer.Exit(EXIT_STATUS[made.verdict])


@app.command("compare")
def compare_outputs(
    task_type: Annotated[str, typer.Argument(metavar="TYPE", help="The task type.")],
    file: Annotated[Path, typer.Argument(help="Tasks, one JSON object per line, as for a batch.")],
    canary: Annotated[str, typer.Option(help="The track to judge.")] = "canary",
    stable: Annotated[str, typer.Option(help="The track to compare it with.")] = "stable",
    agreement: Annotated[
        str, typer.Option("--min-agreement", help="The share of the compared tasks that has to agree.")
    ] = "100%",
    tolerance: Annotated[
        float, typer.Option(min=0, help="By how much numbers may differ, as a share.")
    ] = 0.01,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often a task is submitted at most.")] = 10,
    within: Annotated[str, typer.Option(help="The time for all rounds.")] = "30m",
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "low",
    as_json: JsonFlag = False,
) -> None:
    """Run tasks on both tracks and compare the outputs.

    Each task is submitted again until a worker of each track has done it. This takes engine time.

    Exit status: 0 if the outputs agree, 3 if they differ, 4 if some tasks could not be compared, 1 on an error.
    """
    if priority not in get_args(Priority):
        raise InvalidTask(f"--priority {priority!r} is not one of {', '.join(get_args(Priority))}")
    least = 1.0 if agreement == "100%" else float(parse_share("--min-agreement", agreement))
    pairs, seconds = read_tasks(_lines(file), task_type), float(parse_span("--within", within))
    with Client() as client:
        for missing in replay(
            client, task_type, pairs, (canary, stable), rounds=rounds, seconds=seconds,
            priority=priority,  # type: ignore[arg-type] # checked above
        ):  # fmt: skip
            errors.print(f"{len(pairs) - missing} of {len(pairs)} tasks done by both tracks")
    judged = [(pair, *pair.judge(canary, stable, tolerance)) for pair in pairs]
    counts = Counter(answer for _, answer, _ in judged)
    verdict = outputs_verdict(counts, least)
    if as_json:
        lines = [
            {"line": pair.number, "answer": answer, "at": place, "tasks": pair.task_ids}
            for pair, answer, place in judged
        ]
        print_json(
            {
                "type": task_type,
                **{name: counts[name] for name in ANSWERS},
                "lines": lines,
                "verdict": verdict,
            }
        )
    else:
        rows = [
            [
                pair.number,
                answer,
                place,
                *(" ".join(pair.task_ids.get(name, [])) for name in (canary, stable)),
            ]
            for pair, answer, place in judged
            if answer != "same"
        ]
        if rows:
            print_table(["line", "answer", "first difference", canary, stable], rows)
        console.print(f"verdict: {verdict}: " + ", ".join(f"{counts[name]} {name}" for name in ANSWERS))
    if verdict != "good":
        raise typer.Exit(EXIT_STATUS[verdict])


def _lines(file: Path) -> list[Any]:
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise InvalidTask(f"{file}, line {number}: {error}") from error
    return found


def _tracks(task_type: str, seconds: float) -> dict[str, TrackCounts]:
    index = StatusIndex.from_settings(StorageSettings.load())
    logging.getLogger("inferq.storage").addHandler(logging.NullHandler())  # main prints the error, once
    try:
        index.require_supported()
        return TrackRecords(index).read(task_type, seconds)
    except StatusOutage as error:
        raise StatusOutage(f"the figures are unknown: {error}") from error
    finally:
        index.close()


def _print(canary: str, stable: str, made: Comparison) -> None:
    both = (made.canary, made.stable)
    rows: list[list[str]] = [
        ["attempts", *(f"{counts.attempts:,}" for counts in both), ""],
        [
            "failed",
            *(_failed(counts) for counts in both),
            _range(made.more_failures, lambda share: f"{share:+.1%}"),
        ],
    ]
    for share, ratio in made.slowdowns.items():
        values = (quantile(counts.buckets, share).value for counts in both)
        rows.append(
            [
                f"engine seconds, p{share * 100:.0f}",
                *("?" if value is None else f"{value:.3g}" for value in values),
                _range(ratio, lambda times: f"×{times:.2f}"),
            ]
        )
    print_table(["", canary, stable, "difference (95 %)"], rows)
    console.print(": ".join(filter(None, [f"verdict: {made.verdict}", "; ".join(made.reasons)])))


def _failed(counts: TrackCounts) -> str:
    rate = failure_rate(counts)
    return "?" if rate is None else f"{counts.failures:,} ({rate:.1%})"


def _range(estimate: Estimate, text: Any) -> str:
    value, low, high = (
        "?" if number is None else text(number) for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} ({low} to {high})"


def _facts(task_type: str, seconds: float, canary: str, stable: str, made: Comparison) -> dict[str, Any]:
    return {
        "type": task_type,
        "since_seconds": seconds,
        "tracks": {
            role: {"track": name, **_figures(counts)}
            for role, name, counts in (("canary", canary, made.canary), ("stable", stable, made.stable))
        },
        "more_failures": vars(made.more_failures),
        "slowdown": {f"p{share * 100:.0f}": vars(ratio) for share, ratio in made.slowdowns.items()},
        "verdict": made.verdict,
        "reasons": list(made.reasons),
    }


def _figures(counts: TrackCounts) -> dict[str, Any]:
    return {
        "attempts": counts.attempts,
        "succeeded": counts.outcomes["succeeded"],
        "failed": counts.outcomes["failed"],
        "retried": counts.outcomes["retried"],
        "failure_rate": failure_rate(counts),
        "engine_seconds": {
            f"p{share * 100:.0f}": vars(quantile(counts.buckets, share)) for share in (0.5, 0.95)
        },
    }
