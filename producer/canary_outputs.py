"""Whether two tracks give the same outputs: each task is submitted until a worker of each has done it.

Nobody chooses the track of a task: both tracks take from the same queues. So the tasks go in rounds. A task that the
stable track did twice with different outputs says nothing of the canary, and is set aside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from pydantic import JsonValue

from inferq.producer.canary import Verdict
from inferq.schemas import InferqError, InvalidTask, Priority, Result, TaskStatus

Answer = Literal["same", "different", "unstable", "missing"]
"""`unstable`: the stable track does not agree with itself. `missing`: one of the tracks has not done the task."""

ANSWERS: tuple[Answer, ...] = get_args(Answer)

MAX_TASKS = 1000
_NOT_COPIED = {
    *("task_id", "task_type", "priority", "tenant", "batch_id", "batch_line", "metadata", "created_at"),
    *("callback_url", "callback_events", "expires_at"),
}


class Tasks(Protocol):
    """The calls of inferq.Client that this needs."""

    def submit(self, task_type: str, *, priority: Priority, **fields: Any) -> TaskStatus: ...

    def wait(self, task_id: str, timeout: float | None = None) -> TaskStatus: ...

    def result(self, task_id: str) -> Result: ...

    def cancel(self, task_id: str) -> TaskStatus: ...


@dataclass
class Pair:
    """One task and the results of its copies, by track."""

    number: int
    fields: Mapping[str, JsonValue]
    results: dict[str, list[Result]] = field(default_factory=dict)

    @property
    def task_ids(self) -> dict[str, list[str]]:
        return {track: [result.task_id for result in results] for track, results in self.results.items()}

    def judge(self, canary: str, stable: str, tolerance: float) -> tuple[Answer, str]:
        """How the tracks' outputs compare, and where they differ first."""
        ours, theirs = self.results.get(canary, []), self.results.get(stable, [])
        if not ours or not theirs:
            return "missing", ""
        for other in theirs[1:]:
            if place := first_difference(_output(theirs[0]), _output(other), tolerance):
                return "unstable", place
        for result in ours:
            if place := first_difference(_output(theirs[0]), _output(result), tolerance):
                return "different", place
        return "same", ""


def read_tasks(lines: Sequence[Any], task_type: str) -> list[Pair]:
    """The tasks of a file with one per line, without ids, callbacks and the like. Raises InvalidTask."""
    pairs = []
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict):
            raise InvalidTask(f"line {number} is no JSON object; write the fields of one task on each line")
        if line.get("task_type", task_type) != task_type:
            raise InvalidTask(f"line {number} is of type {line['task_type']!r}, not {task_type!r}")
        pairs.append(Pair(number, {name: value for name, value in line.items() if name not in _NOT_COPIED}))
    if not 1 <= len(pairs) <= MAX_TASKS:
        raise InvalidTask(f"the file has {len(pairs):,} tasks; give from 1 to {MAX_TASKS:,}")
    return pairs


def replay(
    client: Tasks,
    task_type: str,
    pairs: Sequence[Pair],
    tracks: tuple[str, str],
    *,
    rounds: int,
    seconds: float,
    priority: Priority,
) -> Iterator[int]:
    """Submit each task that a track lacks, once each round; gives how many tasks still lack one after the round.

    Results of the result cache do not count. `seconds` is the time for all rounds; what has not ended then is
    cancelled, as on any error. Raises NotEnded.
    """
    end = time.monotonic() + seconds
    for _ in range(rounds):
        left = [pair for pair in pairs if not all(pair.results.get(track) for track in tracks)]
        if not left:
            return
        sent: dict[str, Pair] = {}
        try:
            for pair in left:
                sent[client.submit(task_type, priority=priority, **pair.fields).task_id] = pair
            for task_id in list(sent):
                client.wait(task_id, max(0.0, end - time.monotonic()))
                result, pair = client.result(task_id), sent.pop(task_id)
                if result.track is not None and not result.cached:
                    pair.results.setdefault(result.track, []).append(result)
        finally:
            for task_id in sent:  # none, unless something went wrong
                with suppress(InferqError):
                    client.cancel(task_id)
        yield sum(not all(pair.results.get(track) for track in tracks) for pair in pairs)


def outputs_verdict(counts: Mapping[Answer, int], min_agreement: float) -> Verdict:
    """The verdict on a number of tasks. It is clear if those that could not be compared cannot change it."""
    compared, missing = counts["same"] + counts["different"], counts["missing"]
    if counts["different"] and counts["same"] + missing < min_agreement * (compared + missing):
        return "worse"
    if compared and counts["same"] >= min_agreement * (compared + missing):
        return "good"
    return "unclear"


def first_difference(one: Any, other: Any, tolerance: float, place: str = "") -> str:
    """The path of the first difference of two JSON values, such as `pages.0.text`; empty if they agree.

    Numbers agree within `tolerance`, relative to the larger one, or within it if both are small.
    """
    numbers = [
        value for value in (one, other) if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if len(numbers) == 2:
        return "" if math.isclose(*numbers, rel_tol=tolerance, abs_tol=tolerance) else place or "."
    if type(one) is not type(other):
        return place or "."
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return _below(place, min(one.keys() ^ other.keys()))
        parts = ((name, one[name], other[name]) for name in one)
        return next(
            (
                found
                for name, a, b in parts
                if (found := first_difference(a, b, tolerance, _below(place, name)))
            ),
            "",
        )
    if isinstance(one, list):
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            if found := first_difference(a, b, tolerance, _below(place, str(number))):
                return found
        return _below(place, str(min(len(one), len(other)))) if len(one) != len(other) else ""
    return "" if one == other else place or "."


def _below(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _output(result: Result) -> dict[str, Any]:
    """What a task gave: its output, its artifacts by their content, or the code of its failure."""
    if result.error is not None:
        return {"error": result.error.code}
    return {"output": result.output, "artifacts": {each.name: each.sha256 for each in result.artifacts}}
