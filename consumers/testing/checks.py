"""The checks of the engine contract. The worker relies on each of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import jsonschema

from inferq.consumers.engine import TaskAborted
from inferq.consumers.testing.batches import (
    a_bad_task_fails_alone_in_a_batch,
    a_batch_gives_what_single_runs_give,
    a_cancelled_task_leaves_its_batch_alone,
    check_progress,
)
from inferq.consumers.testing.bench import Bench, ContractBroken, Sample
from inferq.consumers.testing.content import is_of_type
from inferq.consumers.testing.files import files_left
from inferq.consumers.testing.memory import resident_bytes, traced_bytes
from inferq.schemas import InvalidTask

Check = Callable[[Bench], None]
"""A function that puts the engine of a bench to one test, and raises ContractBroken if it fails."""

_BLOCKS = 8
"""The process counts as growing if it grows in each of so many blocks of rounds."""
_BLOCKS_OF_OBJECTS = 12
"""The same for what Python allocates: a cache of objects may take so long to fill up."""
_BLOCK_SECONDS = 0.25
ROUNDS = range(1, 51)
"""How often all samples are run in a block: as many times as fit into the seconds above."""
_ALLOWED_OBJECTS = 100
"""Bytes that Python (numpy's arrays are among them) may hold on to, on average, after a round."""
_ALLOWED_OBJECTS_BLOCK = 16 * 1024
"""What a whole block may leave, where it has few rounds: Python's free lists take that long to fill up."""
_ALLOWED_RESIDENT = 128 * 1024
"""Bytes of the process that a round may leave; the least native leak that can be told from noise."""


def describes_itself_without_its_engine(bench: Bench) -> None:
    """Importing the description does not import the engine: gateway and command line load no framework."""
    task_type = bench.subject.task_type
    unknown = [name for name in task_type.arguments if name not in task_type.task.model_fields]
    if unknown:
        raise ContractBroken(f"arguments names {', '.join(unknown)}, which {task_type.task.__name__} lacks")
    described, engine = task_type.task.__module__, task_type.engine.partition(":")[0]
    told = subprocess.run(
        [sys.executable, "-c", f"import {described}, sys; print({engine!r} in sys.modules)"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        raise ContractBroken(f"{described} cannot be imported: {told.stderr[-500:]}")
    if told.stdout.split()[-1] == "True":
        raise ContractBroken(
            f"{described} imports {engine}: keep the engine, and whatever it computes with, out of what "
            "describes the type"
        )


def output_fits_the_schema(bench: Bench) -> None:
    """The output of each sample fits the published JSON Schema of the type."""
    validator = jsonschema.Draft202012Validator(bench.subject.task_type.output.model_json_schema())
    for sample in bench.subject.samples:
        with bench.run(sample) as run:
            fault = next(validator.iter_errors(json.loads(bench.text(run))), None)
        if fault is not None:
            raise ContractBroken(f"{sample}: output breaks its schema at {fault.json_path}: {fault.message}")


def progress_goes_forward(bench: Bench) -> None:
    """Progress is a number from 0 to 1 that never goes back."""
    for sample in bench.subject.samples:
        with bench.run(sample) as run:
            check_progress(sample, run)


def cancel_stops_it(bench: Bench) -> None:
    """A run that checks for an abort, and is asked to stop, raises TaskAborted; the engine goes on.

    One run is asked at its first check, another at its last.
    """
    polled = False
    for sample in bench.subject.samples:
        with bench.run(sample) as run:
            looks = run.polls
        polled |= looks > 0
        for at in sorted({1, looks} if looks else ()):
            _check_stops(bench, sample, at, looks)
            bench.check_it_goes_on("a cancelled run")
    if polled and not bench.subject.polls:
        raise ContractBroken("a run looks for aborts: leave polls=False out")
    if bench.subject.polls and not polled:
        raise ContractBroken(
            "no run looked for an abort: call context.check_abort() between the steps, and have a sample "
            "with several; if the engine cannot stop by itself, say polls=False: then the worker kills it"
        )


def _check_stops(bench: Bench, sample: Sample, at: int, looks: int) -> None:
    try:
        with bench.run(sample, abort_at=at) as run:
            told = run.told_to_abort  # by the clock, a second run may look less often than the first
    except TaskAborted:
        return
    except Exception as error:
        raise ContractBroken(
            f"{sample}: told to stop, run() raised {error!r} instead of TaskAborted"
        ) from error
    if told:
        raise ContractBroken(
            f"{sample}: told to stop at look {at} of {looks}, run() went on to its end: let "
            "context.check_abort() raise, and do not catch TaskAborted"
        )


def bad_input_is_refused(bench: Bench) -> None:
    """Input that will never work is InvalidTask, with a code and a message, and costs nobody else's task."""
    first = bench.subject.samples[0]
    try:
        bench.read(Sample({**first.fields, "options": {"no_such_option": 1}}, first.files))
    except InvalidTask:
        pass
    else:
        raise ContractBroken(
            "an unknown option is let through: derive the options from inferq.engine.Options"
        )
    for sample in bench.subject.refused:
        try:
            with bench.run(sample):
                pass
        except InvalidTask as error:
            if sample.code not in {None, error.code}:
                raise ContractBroken(
                    f"{sample}: refused as {error.code!r}, not as {sample.code!r}: {error}"
                ) from error
            if not error.message.strip():
                raise ContractBroken(f"{sample}: refused without a message") from error
        except Exception as error:
            raise ContractBroken(
                f"{sample}: raised {error!r}, which is tried again; raise inferq.engine.InvalidTask"
            ) from error
        else:
            raise ContractBroken(f"{sample}: accepted, though it is to be refused")
        bench.check_it_goes_on("a refused task")


def artifacts_are_what_they_say(bench: Bench) -> None:
    """Each announced artifact is there, is not empty, and holds what its content type says."""
    for sample in bench.subject.samples:
        with bench.run(sample) as run:
            for artifact in run.artifacts:
                where = f"{sample}: artifact {artifact.name!r}"
                if not artifact.path.is_file():
                    raise ContractBroken(f"{where} is announced and was not written")
                content = artifact.path.read_bytes()
                if not content:
                    raise ContractBroken(f"{where} is empty")
                if not is_of_type(content, artifact.content_type):
                    begin = content[:12]
                    raise ContractBroken(f"{where} is not {artifact.content_type}: it begins {begin!r}")


def the_same_task_gives_the_same(bench: Bench) -> None:
    """Two runs of a deterministic sample give the same output, and artifacts of the same bytes."""
    for sample in bench.subject.samples:
        if not sample.deterministic:
            continue
        first, second = _gist(bench, sample), _gist(bench, sample)
        differing = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
        if differing:
            raise ContractBroken(
                f"{sample}: run twice, {', '.join(differing)} came out differently; mend that, or mark the "
                "sample deterministic=False"
            )


def _gist(bench: Bench, sample: Sample) -> dict[str, str]:
    with bench.run(sample) as run:
        return bench.content(run)


def runs_leave_no_files(bench: Bench) -> None:
    """A run leaves its artifacts in scratch, and nothing in the temporary folder or anywhere else.

    What a library keeps from its first run is let pass. Files made elsewhere are seen if Python made them.
    """
    subject = bench.subject
    cases: list[tuple[Sample, int | None]] = [(s, None) for s in (*subject.samples, *subject.refused)]
    cases += [(sample, 1) for sample in subject.samples]
    for sample, abort_at in cases:
        _run_tidily(bench, sample, abort_at)
        for _ in range(2):
            with files_left(bench.folder) as left:
                _run_tidily(bench, sample, abort_at)
            if left:
                raise ContractBroken(f"{sample}: a run left {', '.join(left)}: use context.scratch")


def _run_tidily(bench: Bench, sample: Sample, abort_at: int | None) -> None:
    with suppress(InvalidTask, TaskAborted), bench.run(sample, abort_at=abort_at) as run:
        if run.left_in_scratch:
            raise ContractBroken(
                f"{sample}: {', '.join(run.left_in_scratch)} left in scratch: announce what is an artifact, "
                "and remove the rest, which takes up room until the upload is done"
            )


def runs_leave_no_memory(bench: Bench, *, rounds_allowed: range = ROUNDS) -> None:
    """Once warm, neither Python's objects nor the process grow from run to run. GPU memory is not seen."""
    began = time.monotonic()
    for _ in range(2):
        _round(bench)
    seconds = max((time.monotonic() - began) / 2, 1e-6)
    rounds = min(max(int(_BLOCK_SECONDS / seconds), rounds_allowed[0]), rounds_allowed[-1])
    _check_growth(bench, "the process", resident_bytes, _BLOCKS, rounds, _ALLOWED_RESIDENT * rounds)
    tracemalloc.start()
    try:
        allowed = max(_ALLOWED_OBJECTS * rounds, _ALLOWED_OBJECTS_BLOCK)
        _check_growth(bench, "what Python allocates", traced_bytes, _BLOCKS_OF_OBJECTS, rounds, allowed)
    finally:
        tracemalloc.stop()


def _check_growth(
    bench: Bench, what: str, measure: Callable[[], int], blocks: int, rounds: int, allowed: int
) -> None:
    # Caches fill up in steps, and end. One block without growth shows that: the others need not be run.
    _rounds(bench, rounds)
    before, least = measure(), math.inf
    for _ in range(blocks):
        _rounds(bench, rounds)
        after = measure()
        least = min(least, after - before)
        if least <= allowed:
            return
        before = after
    raise ContractBroken(
        f"{what} grew in each of {blocks} blocks of {rounds} rounds of the samples, by at least "
        f"{least / rounds / 1024:.1f} KiB a round"
    )


def _rounds(bench: Bench, rounds: int) -> None:
    for _ in range(rounds):
        _round(bench)


def _round(bench: Bench) -> None:
    for sample in bench.subject.samples:
        with bench.run(sample):
            pass


def it_can_be_closed(bench: Bench) -> None:
    """close() raises nothing, not even the second time."""
    engine = bench.engine
    try:
        bench.close()
        engine.close()
    except Exception as error:
        raise ContractBroken(f"close() raised {error!r}") from error


CHECKS: tuple[Check, ...] = (
    describes_itself_without_its_engine,
    output_fits_the_schema,
    progress_goes_forward,
    cancel_stops_it,
    bad_input_is_refused,
    artifacts_are_what_they_say,
    the_same_task_gives_the_same,
    a_batch_gives_what_single_runs_give,
    a_bad_task_fails_alone_in_a_batch,
    a_cancelled_task_leaves_its_batch_alone,
    runs_leave_no_files,
    runs_leave_no_memory,
    it_can_be_closed,
)
"""Every check, in the order of a test run. A check raises ContractBroken, or the error of the engine."""
