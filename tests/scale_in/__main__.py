"""`make scale-in`: real workers, scaled by the rules of Kubernetes, with and without the scale-in guard.

Ends with status 1 if a busy worker was removed while another one had been idle for a second, in spite of the guard.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.conftest import RabbitMQ, Redis
from tests.scale_in import first_result
from tests.scale_in.cluster import forks, programs
from tests.scale_in.run import VARIANTS, Row, play


def main() -> int:
    given = _arguments()
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="inferq-scale-in-"))
    rabbitmq, redis = RabbitMQ(folder / "rabbitmq"), Redis(folder / "redis")
    rows: list[Row] = []
    try:
        for node in (rabbitmq, redis):
            node.start()
        if given.first_result:
            print(first_result.measure(given.first_result, rabbitmq, redis.url, folder))
            return 0
        for variant in given.variant or VARIANTS:
            for seed in given.seed or range(1, 6):
                logs = folder / f"{variant} {seed}"
                row = play(
                    variant,
                    seed,
                    scale_ins=given.scale_ins,
                    most_seconds=given.most_seconds,
                    rabbitmq=rabbitmq,
                    redis_url=redis.url,
                    folder=logs,
                    start=forks(logs) if given.fork else programs(logs),
                    say=lambda text: print(text, flush=True),
                )
                rows.append(row)
                print(line(row), *row.notes, sep="\n", flush=True)
                if given.rows:
                    with given.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
    finally:
        for node in (redis, rabbitmq):
            node.discard()
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if given.rows:
        rows = [Row(**json.loads(text)) for text in given.rows.read_text("utf-8").splitlines()]
    print(table(rows))
    guarded = [row for row in rows if row.variant == "guard and order"]
    lost = sum(row.tasks - row.results for row in rows)
    return 1 if lost or sum(row.settled for row in guarded) else 0


def line(row: Row) -> str:
    return (
        f"{row.variant}, seed {row.seed}: {row.scale_ins} scale-ins, {row.removed} pods removed, {row.busy} busy, "
        f"{row.avoidable} of them while another one was idle, {row.settled} while one had been so for a second; "
        f"{row.results} results of {row.tasks} tasks, "
        f"{row.pods} pods, {row.patches} patches, {row.seconds:.0f} s"
    )


def table(rows: list[Row]) -> str:
    """The rows by variant, in Markdown."""
    lines = [
        "| | scale-ins | pods removed | of them busy | while another was idle | while another had been idle for 1 s "
        "| tasks | results | patches |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        of_it = [row for row in rows if row.variant == variant]
        if of_it:
            sums = [
                sum(getattr(row, name) for row in of_it)
                for name in (
                    "scale_ins",
                    "removed",
                    "busy",
                    "avoidable",
                    "settled",
                    "tasks",
                    "results",
                    "patches",
                )
            ]
            lines.append(f"| {variant}, {len(of_it)} seeds | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.scale_in", description=__doc__)
    parser.add_argument(
        "--seed", type=int, action="append", help="draw from this seed; may be repeated (1 to 5)"
    )
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--scale-ins", type=int, default=40, metavar="N", help="so many of each seed (40)")
    parser.add_argument(
        "--most-seconds", type=float, default=600.0, help="at most so long for each seed (600)"
    )
    parser.add_argument(
        "--first-result", metavar="TYPE", help="measure from zero to the first result, and back"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="a run in several parts: gather its rows here"
    )
    parser.add_argument(
        "--fork", action="store_true", help="fork workers from a process that has imported inferq"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
