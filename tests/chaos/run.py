"""A run: scenarios one after the other on one ground, each reckoned up at its end."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

from inferq.schemas import InferqError
from tests.chaos.ledger import Entry
from tests.chaos.plan import draw
from tests.chaos.reckoning import Reckoning, reckon, recovery
from tests.chaos.scenarios import Scenario
from tests.chaos.site import Ground, Site
from tests.waiting import eventually

SETTLE_SECONDS = 120.0


@dataclass(frozen=True)
class Row:
    """What a scenario came to. `recovery` and `figures` are seconds, in ascending order."""

    scenario: str
    title: str
    seed: int
    tasks: int
    faults: dict[str, int]
    lost: int
    second_results: int
    burnt: int
    unexpected: int
    recovered: int
    repeated: int
    unconfirmed: int
    recovery: list[float]
    figures: dict[str, list[float]]
    seconds: float
    rabbitmq: str
    problems: list[str]

    @property
    def green(self) -> bool:
        return not (self.lost or self.second_results or self.burnt or self.unexpected or self.problems)

    @property
    def fault_count(self) -> int:
        return sum(self.faults.values())

    def line(self) -> str:
        """One line for the terminal."""
        median = f"{statistics.median(self.recovery):.2f}" if self.recovery else "-"
        most = f"{self.recovery[-1]:.2f}" if self.recovery else "-"
        return (
            f"{'ok ' if self.green else 'RED'} {self.scenario:15} {self.tasks:5} tasks {self.fault_count:4} "
            f"faults  lost {self.lost}  second results {self.second_results}  attempts burnt {self.burnt}  "
            f"unexpected {self.unexpected}  "
            f"recovered {self.recovered}  repeated starts {self.repeated}  "
            f"back after {median} s (most {most})  {self.seconds:.0f} s"
        )


def play(scenario: Scenario, ground: Ground, seed: int, *, quick: bool) -> tuple[Row, list[str]]:
    """Run one scenario. Gives what it came to, and what is to be said of it: findings and histories."""
    began = time.monotonic()
    load = scenario.quick if quick and scenario.quick else scenario.load
    random = Random(f"{seed} {scenario.name}")
    tasks = draw(scenario.name, load, random)
    problems: list[str] = []
    with Site(scenario.name, ground, scenario.needs, tasks, load.seconds, random, quick=quick) as site:
        try:
            eventually(lambda: all(part.ready() for part in site.parts), "ready workers")
            site.send()
            scenario.breaks(site)
            site.settle(SETTLE_SECONDS)
        except (TimeoutError, RuntimeError, InferqError, httpx.HTTPError) as error:
            problems.append(f"the scenario broke off: {error}")
        site.close_books()
        entries = site.ledger.read()
    problems += site.problems
    reckoning = reckon(entries, site.tasks)
    row = Row(
        scenario=scenario.name,
        title=scenario.title,
        seed=seed,
        tasks=reckoning.confirmed,
        faults=dict(Counter(entry.what for entry in entries if entry.kind == "fault")),
        lost=reckoning.count("lost"),
        second_results=reckoning.count("second result"),
        burnt=reckoning.count("attempt burnt"),
        unexpected=reckoning.count("unexpected"),
        recovered=len(reckoning.recovered),
        repeated=reckoning.repeated,
        unconfirmed=len(reckoning.unconfirmed),
        recovery=recovery(entries),
        figures=site.figures,
        seconds=time.monotonic() - began,
        rabbitmq=ground.broker.version,
        problems=problems,
    )
    return row, [*problems, *_told(reckoning, entries)]


def _told(reckoning: Reckoning, entries: Sequence[Entry], most: int = 20) -> list[str]:
    """The findings, and the whole history of each task that has one."""
    told = [str(finding) for finding in reckoning.findings]
    tasks = list(dict.fromkeys(finding.task for finding in reckoning.findings))
    for task in tasks[:most]:
        told.append(f"history of {task}:")
        told += [f"  {entry}" for entry in entries if entry.task == task]
    if len(tasks) > most:
        told.append(f"and {len(tasks) - most} histories more, in the ledger")
    return told


def log_tracebacks(folder: Path) -> list[str]:
    """Log files that hold a traceback: no fault of ours should make a worker raise."""
    return sorted(
        str(path) for path in folder.rglob("*.log") if b"Traceback (most recent" in path.read_bytes()
    )
