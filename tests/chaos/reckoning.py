"""The reckoning: a ledger held against its plan. Pure, so that every case is tried without a broker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tests.chaos.ledger import Entry, Kind
from tests.chaos.plan import PlannedTask

Fault = Literal["lost", "second result", "attempt burnt", "unexpected"]


_DROPPED = {"expired": "expired", "dropped": "maxlen"}
"""The codes of tasks whose messages RabbitMQ dropped, and the reasons that their dead letters give."""


@dataclass(frozen=True)
class Finding:
    """Something that must not be."""

    fault: Fault
    task: str
    why: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.task}: {self.why}"


@dataclass(frozen=True)
class Reckoning:
    """What became of all tasks.

    `unconfirmed` tasks were sent and ended although nobody knows of a confirm: that is allowed, and so is
    that a task `recovered`: it ended well after more engine starts than it needed. `repeated` counts those
    additional starts: effects that were had twice.
    """

    confirmed: int
    ended: int
    faults: int
    findings: tuple[Finding, ...]
    recovered: tuple[str, ...]
    unconfirmed: tuple[str, ...]
    repeated: int

    def count(self, fault: Fault) -> int:
        """How many tasks have such a finding."""
        return len({finding.task for finding in self.findings if finding.fault == fault})


def reckon(entries: Iterable[Entry], plan: Mapping[str, PlannedTask]) -> Reckoning:
    """Hold what the ledger says against the plan."""
    histories: dict[str, dict[Kind, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    faults = 0
    spares_engines = True
    for entry in entries:
        faults += entry.kind == "fault"
        spares_engines &= not (entry.kind == "fault" and entry.what == "engine killed")
        if entry.task and entry.kind not in ("fault", "mended", "helper"):
            histories[entry.task][entry.kind].append(entry)
    findings: list[Finding] = []
    recovered: list[str] = []
    unconfirmed: list[str] = []
    confirmed = ended = repeated = 0
    for task, history in sorted(histories.items()):
        has_ended = bool(history["result"] or history["failure"])
        confirmed += bool(history["confirmed"])
        ended += has_ended
        if has_ended and history["sent"] and not history["confirmed"]:
            unconfirmed.append(task)
        found = list(_findings(task, history, plan.get(task)))
        if spares_engines and task in plan:
            found += _burnt(task, history, plan[task])
        findings += found
        planned = plan[task].starts if task in plan else None
        additional = len(history["start"]) - planned if planned is not None else 0
        if additional > 0:
            repeated += additional
            if has_ended and not found:
                recovered.append(task)
    return Reckoning(
        confirmed, ended, faults, tuple(findings), tuple(recovered), tuple(unconfirmed), repeated
    )


def _findings(
    task: str, history: Mapping[Kind, list[Entry]], planned: PlannedTask | None
) -> Iterator[Finding]:
    results, failures, letters = history["result"], history["failure"], history["dead"]
    if planned is None or not history["sent"]:
        yield Finding("unexpected", task, "nobody submitted it")
        return
    if history["confirmed"] and not results and not failures:
        dead = f"; its dead letter says {letters[0].what!r}" if letters else ""
        yield Finding("lost", task, f"it was confirmed and never ended{dead}")
    yield from _second(task, history)
    for answer in sorted({entry.what for entry in history["denied"]}):
        yield Finding("unexpected", task, f"the gateway refused it, or said that it does not exist: {answer}")
    if planned.callback and (results or failures):
        yield from _callbacks(task, history)
    if results and failures:
        yield Finding("unexpected", task, f"it failed ({failures[0].what}) and succeeded")
    if results and letters and not planned.droppable:
        yield Finding("unexpected", task, f"it succeeded, and has a dead letter ({letters[0].what})")
    started = {entry.run for entry in history["start"]}
    for run in sorted({entry.run for entry in results} - started):
        yield Finding("unexpected", task, f"its result names run {run!r}, which no engine began")
    if results and planned.code is not None:
        yield Finding("unexpected", task, f"it succeeded, and was to fail with {planned.code!r}")
    for code in sorted({entry.what for entry in failures}):
        if code != planned.code and not (planned.droppable and code in _DROPPED):
            yield Finding("unexpected", task, f"it failed with {code!r}, and was to {_end(planned)}")
        if _DROPPED.get(code, code) not in {entry.what for entry in letters}:
            yield Finding("unexpected", task, f"it failed with {code!r}, and no dead letter says so")


def _burnt(task: str, history: Mapping[Kind, list[Entry]], planned: PlannedTask) -> Iterator[Finding]:
    """No outage costs an attempt: only a task's own fault does, or the death of its engine."""
    taken = max((int(entry.what) for entry in history["attempts"]), default=0)
    if planned.starts is not None and taken > planned.starts:
        yield Finding(
            "attempt burnt",
            task,
            f"it took {taken} attempts of {planned.starts}, and none of its engines was killed",
        )


def _second(task: str, history: Mapping[Kind, list[Entry]]) -> Iterator[Finding]:
    """Signs that a record was replaced: it named two runs, or its text changed.

    An event of success that names another run than the record counts too: it tells of a record that was
    there before anybody could see it.
    """
    told = [entry for entry in history["event"] if entry.what == "task.succeeded" and entry.run]
    runs = {entry.run for entry in (*history["result"], *told)}
    if len(runs) > 1:
        yield Finding(
            "second result", task, f"results of {len(runs)} runs were kept: {', '.join(sorted(runs))}"
        )
        return
    for kind in ("result", "failure"):
        texts = {entry.content for entry in history[kind] if entry.content}
        if len(texts) > 1:
            yield Finding("second result", task, f"its {kind} was replaced: {len(texts)} different texts")


def _callbacks(task: str, history: Mapping[Kind, list[Entry]]) -> Iterator[Finding]:
    """A task that ended is called back at least once, always under one id, and as it ended."""
    if not history["callback"]:
        yield Finding("lost", task, "it ended, and nobody was called back")
    ids = {entry.run for entry in history["callback"]}
    if len(ids) > 1:
        yield Finding("unexpected", task, f"its end was called back under {len(ids)} ids")
    right = "task.succeeded" if history["result"] else "task.failed"
    for wrong in sorted({entry.what for entry in history["callback"]} - {right}):
        yield Finding("unexpected", task, f"it was called back with {wrong!r}, and not with {right!r}")


def _end(planned: PlannedTask) -> str:
    return f"fail with {planned.code!r}" if planned.code else "succeed"


def recovery(entries: Iterable[Entry]) -> list[float]:
    """Seconds from the end of each fault to the next engine start, in ascending order."""
    starts: list[float] = []
    mended: list[float] = []
    for entry in entries:
        if entry.kind == "start":
            starts.append(entry.at)
        elif entry.kind == "mended":
            mended.append(entry.at)
    starts.sort()
    waits = []
    for moment in mended:
        following = next((start for start in starts if start >= moment), None)
        if following is not None:
            waits.append(following - moment)
    return sorted(waits)
