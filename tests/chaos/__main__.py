"""`make chaos`: breaks what can be broken, and holds the ledger against the promise.

Ends with status 1 where a task was lost, had a second result, or ended otherwise than it had to.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.broker import PrivateRabbit
from tests.chaos.debian import NotHere, rabbitmq_4
from tests.chaos.processes import Crew
from tests.chaos.report import PAGE, read_rows, write_page, write_rows
from tests.chaos.run import Row, log_tracebacks, play
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.site import Ground


def main() -> int:
    given = _arguments()
    # S3 in this run takes any credentials; boto3 must not look for real ones.
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "chaos",
        "AWS_SECRET_ACCESS_KEY": "chaos",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    os.environ.pop("AWS_PROFILE", None)
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seeds = given.seed or ([1] if given.quick else [first := int(time.time()) % 100_000, first + 1])
    chosen = [s for s in SCENARIOS if not given.only or s.name in given.only]
    if given.quick and not given.only:
        chosen = [s for s in chosen if s.quick is not None]
    folder = Path(tempfile.mkdtemp(prefix="inferq-chaos-"))
    rows: list[Row] = []
    print(f"seeds {', '.join(map(str, seeds))}; ledgers and logs in {folder}", flush=True)
    try:
        with Crew(folder / "logs") as crew:
            grounds: dict[tuple[Path | None, int], Ground] = {}
            for seed, home in zip(seeds, _homes(given, len(seeds)), strict=True):
                for scenario in chosen:
                    key = home, scenario.nodes
                    if key not in grounds:
                        grounds[key] = _ground(crew, folder / f"ground-{len(grounds)}", *key)
                    print(f"{len(rows) + 1} of {len(seeds) * len(chosen)}: {scenario.title}", flush=True)
                    row, told = play(scenario, grounds[key], seed, quick=given.quick)
                    print(row.line(), *told, sep="\n", flush=True)
                    rows.append(row)
    finally:
        if given.rows:
            rows = _merged([*read_rows(given.rows), *rows])
            write_rows(given.rows, rows)
    green = all(row.green for row in rows)
    tasks, faults = sum(row.tasks for row in rows), sum(row.fault_count for row in rows)
    print(
        f"{tasks:,} tasks, {faults} faults, {sum(r.lost for r in rows)} lost, "
        f"{sum(r.second_results for r in rows)} second results, {sum(r.burnt for r in rows)} attempts burnt"
    )
    for path in log_tracebacks(folder):
        print(f"a traceback stands in {path}")
    if green and not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    if green and (given.rows or not (given.quick or given.only)):
        write_page(rows)
        print(f"written to {PAGE}")
    return 0 if green else 1


def _ground(crew: Crew, folder: Path, home: Path | None, nodes: int) -> Ground:
    folder.mkdir()
    return Ground(crew, folder, PrivateRabbit(crew, folder / "rabbitmq", nodes=nodes, home=home))


def _merged(rows: list[Row]) -> list[Row]:
    """Of each seed and scenario the last row, in the order of a run in one part."""
    order = [scenario.name for scenario in SCENARIOS]
    last = {(row.seed, order.index(row.scenario)): row for row in rows}
    return [last[key] for key in sorted(last)]


def _homes(given: argparse.Namespace, seeds: int) -> list[Path | None]:
    """The RabbitMQ of each seed: None is the one that is installed, and the last of several is RabbitMQ 4."""
    wanted = given.rabbitmq or ("4" if seeds > 1 else "installed")
    if wanted == "installed":
        return [None] * seeds
    try:
        home = rabbitmq_4(_RABBITMQ_4)
    except NotHere as error:
        if given.rabbitmq:
            sys.exit(f"{error}")
        print(f"skipped: the suite on RabbitMQ 4: {error}", flush=True)
        return [None] * seeds
    return [home] * seeds if given.rabbitmq else [*([None] * (seeds - 1)), home]


_RABBITMQ_4 = Path(__file__).parents[2] / ".make" / "rabbitmq-4"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, action="append", help="draw from this seed; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer tasks and faults, and nothing is written")
    parser.add_argument("--only", choices=[s.name for s in SCENARIOS], nargs="+", help="only these scenarios")
    parser.add_argument(
        "--rabbitmq",
        choices=["installed", "4"],
        help="the RabbitMQ to run on; by default the installed one, and 4 for the last of several seeds",
    )
    parser.add_argument("--keep", action="store_true", help="keep ledgers and logs of a green run too")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="a run in several parts: gather their rows here"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
