"""inferq canary: whether new code or new weights do as well as the old ones."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from inferq.producer.canary import Comparison, Estimate, Limits, Verdict, compare, failure_rate, quantile
from inferq.producer.capacity import parse_number, parse_share, parse_span
from inferq.producer.cli.output import JsonFlag, console, duration_text, print_json, print_table
from inferq.schemas import InvalidTask
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
