"""The checks of an engine that computes several tasks together. One with a `batch_size` of 1 passes them."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

from inferq.consumers.engine import Engine, TaskAborted
from inferq.consumers.testing.bench import Bench, ContractBroken, Run, Sample
from inferq.schemas import InvalidTask

_TOLERANCE = 1e-3
"""How far a number of a batch may be from that of a single run: models round differently in a batch."""


def a_batch_gives_what_single_runs_give(bench: Bench) -> None:
    """In a batch, each sample gives the output and the artifacts of a single run. Numbers may differ by 0.001."""
    for batch in _batches(bench):
        alone = {id(sample): _content(bench, sample) for sample in batch}
        with bench.run_batch(batch) as outcomes:
            for sample, outcome in zip(batch, outcomes, strict=True):
                _check_same(bench, sample, outcome, alone[id(sample)])


def a_bad_task_fails_alone_in_a_batch(bench: Bench) -> None:
    """A task that is refused fails with its InvalidTask, and its batch gives what it gives without it."""
    for bad in bench.subject.refused:
        try:
            key = _key(bench, bad)
        except InvalidTask:
            continue  # it gets into no batch
        good = [sample for sample in bench.subject.samples if _key(bench, sample) == key][:1] or [bad]
        if bench.engine.batch_size == 1 or _key(bench, good[0]) != key:
            continue
        alone = None if good == [bad] else _content(bench, good[0])
        try:
            with bench.run_batch([*good, bad]) as (beside, refused):
                _check_refused(bad, refused)
                if alone is not None:
                    _check_same(bench, good[0], beside, alone)
        except InvalidTask as error:
            raise ContractBroken(
                f"{bad}: run_batch raised {error!r}, so that its whole batch failed; return the error in the "
                "place of the output"
            ) from error
        bench.check_it_goes_on("a batch with a refused task")


def a_cancelled_task_leaves_its_batch_alone(bench: Bench) -> None:
    """If one task of a batch is asked to stop, the others give what they give alone, or TaskAborted is raised."""
    for batch in _batches(bench):
        alone = {id(sample): _content(bench, sample) for sample in batch}
        try:
            with bench.run_batch(batch, aborted={0}) as outcomes:
                if isinstance(outcomes[0], Exception) and not isinstance(outcomes[0], TaskAborted):
                    raise ContractBroken(
                        f"{batch[0]}: told to stop, it gave {outcomes[0]!r} instead of TaskAborted or its output"
                    )
                for sample, outcome in zip(batch[1:], outcomes[1:], strict=True):
                    _check_same(bench, sample, outcome, alone[id(sample)])
        except TaskAborted:
            pass
        bench.check_it_goes_on("a batch with a cancelled task")


def check_progress(sample: Sample, run: Run) -> None:
    """Raise ContractBroken unless progress is a number from 0 to 1 that never goes back."""
    reached = 0.0
    for fraction in run.progress:
        if not (math.isfinite(fraction) and 0 <= fraction <= 1):
            raise ContractBroken(f"{sample}: progress {fraction:g} is not between 0 and 1")
        if fraction < reached:
            raise ContractBroken(f"{sample}: progress went back from {reached:g} to {fraction:g}")
        reached = fraction


def _batches(bench: Bench) -> Sequence[Sequence[Sample]]:
    """All samples that go with others, or with themselves, in batches of at least two."""
    engine = bench.engine
    size: Any = engine.batch_size
    if not isinstance(size, int) or size < 1:
        raise ContractBroken(f"batch_size is {size!r}: set it to the most tasks of one run_batch, or to 1")
    if size == 1:
        return []
    if type(engine).run_batch is Engine.run_batch:
        raise ContractBroken(f"batch_size is {size}, and there is no run_batch: implement it, or set 1")
    by_key: dict[Hashable, list[Sample]] = {}
    for sample in bench.subject.samples:
        by_key.setdefault(_key(bench, sample), []).append(sample)
    batches = []
    for key, group in by_key.items():
        for at in range(0, len(group), size):
            batch = group[at : at + size]
            if len(batch) > 1:
                batches.append(batch)
            elif _key(bench, group[0]) == key:
                batches.append([group[0], *batch])
    if not batches:
        raise ContractBroken("batch_key gives no two tasks the same key: add a sample that goes with another")
    return batches


def _key(bench: Bench, sample: Sample) -> Hashable:
    key = bench.engine.batch_key(bench.read(sample))
    try:
        hash(key)
    except TypeError as error:
        raise ContractBroken(f"{sample}: batch_key gave {key!r}, which has no hash") from error
    return key


def _content(bench: Bench, sample: Sample) -> dict[str, str]:
    with bench.run(sample) as run:
        return bench.content(run)


def _check_same(bench: Bench, sample: Sample, outcome: Run | Exception, alone: dict[str, str]) -> None:
    if isinstance(outcome, Exception):
        raise ContractBroken(
            f"{sample}: in a batch it failed with {outcome!r}, and alone it does not"
        ) from outcome
    check_progress(sample, outcome)
    if outcome.left_in_scratch:
        raise ContractBroken(f"{sample}: {', '.join(outcome.left_in_scratch)} left in scratch by a batch")
    content = bench.content(outcome)
    if not sample.deterministic:
        return
    differing = [name for name in sorted(content.keys() | alone.keys()) if not _alike(name, content, alone)]
    if differing:
        raise ContractBroken(
            f"{sample}: in a batch, {', '.join(differing)} came out differently than alone; mend that, or mark "
            "the sample deterministic=False"
        )


def _alike(name: str, content: dict[str, str], alone: dict[str, str]) -> bool:
    one, other = content.get(name), alone.get(name)
    if one is None or other is None or name != "the output":
        return one == other
    return _near(json.loads(one), json.loads(other))


def _near(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same, but for the rounding of numbers."""
    match one, other:
        case dict(), dict():
            return one.keys() == other.keys() and all(_near(one[name], other[name]) for name in one)
        case list(), list():
            return len(one) == len(other) and all(map(_near, one, other))
        case (float(), float() | int()) | (int(), float()):
            return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        case _:
            return bool(one == other)


def _check_refused(bad: Sample, outcome: Run | Exception) -> None:
    if not isinstance(outcome, Exception):
        raise ContractBroken(f"{bad}: accepted in a batch, though it is to be refused")
    if not isinstance(outcome, InvalidTask):
        raise ContractBroken(f"{bad}: in a batch it gave {outcome!r}, not inferq.engine.InvalidTask")
    if bad.code not in {None, outcome.code}:
        raise ContractBroken(f"{bad}: in a batch refused as {outcome.code!r}, not as {bad.code!r}")
