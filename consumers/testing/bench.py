"""A subject under test, its samples, and the bench that runs them."""

from __future__ import annotations

import hashlib
import importlib
import json
import mimetypes
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError

from inferq.consumers.engine import ArtifactFile, Context, Engine, InputFile
from inferq.schemas import EngineInfo, InvalidTask, Task, TaskType, describe_faults


class ContractBroken(AssertionError):
    """The engine breaks a rule of the engine protocol. The message says which, and how to repair it."""


@dataclass(frozen=True)
class Sample:
    """A small task for the tests.

    `fields` are the inputs and options, as a producer sends them. `files` maps an input field to the file, or the
    bytes, that the worker would fetch. `deterministic` says that a second run gives the same output. `code` is
    the expected error code of a sample that must be refused.
    """

    fields: Mapping[str, JsonValue] = field(default_factory=dict)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    deterministic: bool = True
    code: str | None = None

    def __str__(self) -> str:
        text = json.dumps(dict(self.fields), ensure_ascii=False)
        return (text if len(text) <= 80 else text[:77] + "...") + "".join(f" +{name}" for name in self.files)


@dataclass(frozen=True)
class Subject:
    """A task type under test: `samples` that its engine must compute, and samples that must be `refused`.

    Samples run dozens of times, so keep them short. `polls=False` is for an engine that cannot stop early: the
    worker kills it on a cancel, and it loads its model again.
    """

    task_type: TaskType
    samples: Sequence[Sample]
    refused: Sequence[Sample] = ()
    polls: bool = True


@dataclass(frozen=True)
class Run:
    """The output, artifacts and progress of one run. Its files exist inside the `with` block of `Bench.run`."""

    output: BaseModel | Mapping[str, Any]
    artifacts: Sequence[ArtifactFile]
    progress: Sequence[float]
    polls: int
    told_to_abort: bool
    left_in_scratch: Sequence[str]


@dataclass(frozen=True)
class _Watched(Context):
    """Reports progress as it comes; the worker's context would clip it to 0 and 1."""

    def progress(self, fraction: float, note: str = "") -> None:
        self.report(fraction, note)


class _Abort:
    """Asks the run to stop, from the `at`-th look on."""

    def __init__(self, at: int | None) -> None:
        self.looks, self.told, self._at = 0, False, at

    def __call__(self) -> bool:
        self.looks += 1
        self.told = self._at is not None and self.looks >= self._at
        return self.told


class _WatchedRun:
    """The context of a run, and what the run does with it."""

    def __init__(self, sample: Sample, scratch: Path, abort_at: int | None) -> None:
        self._scratch = scratch
        self._reported: list[float] = []
        self._abort = _Abort(abort_at)
        self.context = _Watched(
            folder=scratch,
            inputs=dict(_lay_out(sample, scratch)),
            report=lambda fraction, _note: self._reported.append(fraction),
            abort_requested=self._abort,
        )

    def run(self, output: BaseModel | Mapping[str, Any]) -> Run:
        """The run that gave this output."""
        context, abort = self.context, self._abort
        known = {i.path for i in context.inputs.values()} | {a.path for a in context.artifacts}
        files = [p for p in self._scratch.rglob("*") if p.is_file() and p not in known]
        left = [str(p.relative_to(self._scratch)) for p in files]
        return Run(output, tuple(context.artifacts), self._reported, abort.looks, abort.told, left)


class Bench:
    """Runs the engine of one subject as a worker's engine process does. The first run loads it."""

    def __init__(self, subject: Subject) -> None:
        if not subject.samples:
            raise ValueError(f"{subject.task_type.name}: the contract needs at least one sample")
        self.subject = subject
        self.folder = Path(tempfile.gettempdir())
        self._loaded: Engine[Any] | None = None

    @property
    def engine(self) -> Engine[Any]:
        """The engine, loaded and warmed up. Raises ContractBroken if its path leads to no engine."""
        if self._loaded is None:
            module, _, name = self.subject.task_type.engine.partition(":")
            made = getattr(importlib.import_module(module), name)()
            if not isinstance(made, Engine):
                raise ContractBroken(f"{self.subject.task_type.engine} is not an inferq.engine.Engine")
            info = made.load()
            if not isinstance(info, EngineInfo):
                raise ContractBroken(f"load() gave {info!r} instead of an inferq.engine.EngineInfo")
            made.warm_up()
            self._loaded = made
        return self._loaded

    def close(self) -> None:
        """Close the engine. The next run loads a new one."""
        engine, self._loaded = self._loaded, None
        if engine is not None:
            engine.close()

    def read(self, sample: Sample) -> Task:
        """Parse a sample as a gateway does. Raises InvalidTask for wrong fields."""
        urls = {name: f"https://example.com/{name}" for name in sample.files}
        task = {"task_id": "contract", "task_type": self.subject.task_type.name, **urls, **sample.fields}
        try:
            return self.subject.task_type.task.model_validate_json(json.dumps(task))
        except ValidationError as error:
            raise InvalidTask("; ".join(describe_faults(error))) from error

    @contextmanager
    def run(self, sample: Sample, *, abort_at: int | None = None) -> Iterator[Run]:
        """Run a sample. With `abort_at` the run is asked to stop from that look for an abort on.

        Raises any error of the engine, and InvalidTask for wrong fields.
        """
        engine, task = self.engine, self.read(sample)
        with tempfile.TemporaryDirectory(prefix="inferq-contract-", dir=self.folder) as folder:
            watched = _WatchedRun(sample, Path(folder, "scratch"), abort_at)
            yield watched.run(engine.run(task, watched.context))

    @contextmanager
    def run_batch(
        self, samples: Sequence[Sample], *, aborted: Collection[int] = ()
    ) -> Iterator[Sequence[Run | Exception]]:
        """Run samples as one batch; a sample that fails alone gives its error.

        Those at the places `aborted` are asked to stop. Raises any error of `run_batch` itself.
        """
        engine, tasks = self.engine, [self.read(sample) for sample in samples]
        with tempfile.TemporaryDirectory(prefix="inferq-contract-", dir=self.folder) as folder:
            watched = [
                _WatchedRun(sample, Path(folder, str(place)), 1 if place in aborted else None)
                for place, sample in enumerate(samples)
            ]
            outputs = engine.run_batch(tasks, [one.context for one in watched])
            if len(outputs) != len(samples):
                raise ContractBroken(f"run_batch gave {len(outputs)} outputs for {len(samples)} tasks")
            yield [
                output if isinstance(output, Exception) else one.run(output)
                for one, output in zip(watched, outputs, strict=True)
            ]

    def content(self, run: Run) -> dict[str, str]:
        """A run's output as JSON, and the checksum of each artifact, by what they are called."""
        sums = {
            f"artifact {a.name!r}": hashlib.sha256(a.path.read_bytes()).hexdigest() for a in run.artifacts
        }
        return {"the output": self.text(run), **sums}

    def text(self, run: Run) -> str:
        """A run's output as the JSON of the result. Raises ContractBroken if it is not the type's output."""
        model = self.subject.task_type.output
        try:
            output = run.output if isinstance(run.output, model) else model.model_validate(run.output)
        except ValidationError as error:
            faults = "; ".join(describe_faults(error))
            raise ContractBroken(f"the output is not a {model.__name__}: {faults}") from error
        return output.model_dump_json()

    def check_it_goes_on(self, after: str) -> None:
        """Raise ContractBroken if the first sample no longer runs, for example after an error."""
        try:
            with self.run(self.subject.samples[0]) as run:
                self.text(run)
        except Exception as error:
            raise ContractBroken(f"after {after} the engine fails at the next task: {error!r}") from error


def _lay_out(sample: Sample, scratch: Path) -> Iterator[tuple[str, InputFile]]:
    """The inputs as the worker lays them out: each file has the name of its field."""
    for name, source in sample.files.items():
        scratch.mkdir(exist_ok=True)
        content = source if isinstance(source, bytes) else source.read_bytes()
        guess = None if isinstance(source, bytes) else mimetypes.guess_type(source.name)[0]
        (scratch / name).write_bytes(content)
        yield name, InputFile(scratch / name, len(content), guess or "application/octet-stream")
