"""docs/reliability.md, written by the run itself."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.chaos.run import Row

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

_HEAD = """\
# Reliability

Made by `make chaos`. Each scenario runs a real broker, Redis, object store, publisher and workers, breaks
something again and again while tasks are published and computed, and keeps a ledger: every submission sent
and confirmed, every start of an engine, every record in the object store, every end event, every dead letter.
After the last fault the ledger is compared with the submissions:

- **lost**: confirmed by the broker, and never ended in a result or a failure;
- **second results**: a kept record was replaced, or reported differently from the record;
- **burnt**: an outage used up an attempt: the task took more than its own faults need, and no engine was killed;
- **unexpected**: ended differently than planned, record and dead letter contradict each other, or the gateway
  refused it or answered 404 for it;
- **run again**: engine starts beyond those needed. The queue delivers at least once, so a run that was cut
  short is begun anew; its owner sees one end all the same;
- **back after**: seconds from the end of a fault (or, for a kill, from the kill) to the next start of an
  engine, at the median and at most.

At the end no message may be left in a work queue or a retry level, nor among the unroutable. Any lost task,
second result, burnt attempt or unexpected end makes the run fail. What is broken, and when, is drawn from the seed.
"""


def write_page(rows: Sequence[Row]) -> None:
    PAGE.write_text("\n".join(_lines(rows)) + "\n", "utf-8")


def _lines(rows: Sequence[Row]) -> Iterable[str]:
    yield _HEAD
    titles = [
        "scenario",
        "RabbitMQ",
        "seed",
        "tasks",
        "faults",
        "lost",
        "second results",
        "burnt",
        "unexpected",
    ]
    yield f"| {' | '.join(titles)} | run again | back after s |"
    yield f"| --- {'| ---: ' * 10}|"
    for row in rows:
        yield (
            f"| {row.title} | {row.rabbitmq} | {row.seed} | {row.tasks} | {row.fault_count} | {row.lost} | "
            f"{row.second_results} | {row.burnt} | {row.unexpected} | {row.repeated} | {_spread(row.recovery)} |"
        )
    yield (
        f"| **all** | | | **{sum(r.tasks for r in rows)}** | **{sum(r.fault_count for r in rows)}** | "
        f"**{sum(r.lost for r in rows)}** | **{sum(r.second_results for r in rows)}** | "
        f"**{sum(r.burnt for r in rows)}** | **{sum(r.unexpected for r in rows)}** | "
        f"**{sum(r.repeated for r in rows)}** | |"
    )
    yield ""
    yield "Faults: " + ", ".join(f"{what} {count}" for what, count in _faults(rows)) + "."
    waits = sorted(wait for row in rows for wait in row.figures.get("handover seconds", ()))
    if waits:
        yield ""
        yield (
            f"From the `kill -9` of a worker to the start of its task on an idle one: p50 "
            f"{statistics.median(waits):.3f} s, most {waits[-1]:.3f} s, over {len(waits)} kills."
        )
    yield ""
    yield (
        f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, {platform.machine()}, {platform.system()}; "
        f"Python {platform.python_version()}, RabbitMQ {', '.join(sorted({row.rabbitmq for row in rows}))}, "
        f"pika {version('pika')}, redis-py {version('redis')}, moto {version('moto')}."
    )


def _faults(rows: Sequence[Row]) -> list[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.faults)
    return counts.most_common()


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f}, {seconds[-1]:.1f}" if seconds else "–"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), "utf-8")


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
