"""What an engine is put through its paces with: a subject, its samples, and the bench that runs them."""

from __future__ import annotations

import importlib
import json
import mimetypes
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError

from inferq.consumers.engine import ArtifactFile, Context, Engine, InputFile
from inferq.schemas import EngineInfo, InvalidTask, Task, TaskType, describe_faults


class ContractBroken(AssertionError):
    """The engine does not do what the engine protocol asks for."""


@dataclass(frozen=True)
class Sample:
    """A small task. `fields` are inputs and options, as a producer sends them.

    `files` has for an input the file, or the bytes, that the worker would have fetched. `deterministic` says
    that a second run gives the same. `code` is, of a sample that is to be refused, the error's code.
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
    """A task type, the samples that its engine must compute, and those that must be refused.

    Samples are run dozens of times: keep them short. `polls` is whether a run looks for aborts; an engine
    that cannot is killed by the worker instead, and has to load its model anew after each cancelled task.
    """

    task_type: TaskType
    samples: Sequence[Sample]
    refused: Sequence[Sample] = ()
    polls: bool = True


@dataclass(frozen=True)
class Run:
    """What a run gave and did. Its files are there until the `with` block of `Bench.run` ends."""

    output: BaseModel | Mapping[str, Any]
    artifacts: Sequence[ArtifactFile]
    progress: Sequence[float]
    polls: int
    told_to_abort: bool
    left_in_scratch: Sequence[str]


@dataclass(frozen=True)
class _Watched(Context):
    """Does not put progress right, as the worker's context does."""

    def progress(self, fraction: float, note: str = "") -> None:
        self.report(fraction, note)


class _Abort:
    """Says from the `at`-th look on that the run is to stop."""

    def __init__(self, at: int | None) -> None:
        self.looks, self.told, self._at = 0, False, at

    def __call__(self) -> bool:
        self.looks += 1
        self.told = self._at is not None and self.looks >= self._at
        return self.told


class Bench:
    """Runs one engine, as a worker's engine process would. It is loaded at the first run."""

    def __init__(self, subject: Subject) -> None:
        if not subject.samples:
            raise ValueError(f"{subject.task_type.name}: the contract needs at least one sample")
        self.subject = subject
        self.folder = Path(tempfile.gettempdir())
        self._loaded: Engine[Any] | None = None

    @property
    def engine(self) -> Engine[Any]:
        """The engine, loaded and warmed up. Raises ContractBroken where its path leads to none."""
        if self._loaded is None:
            module, _, name = self.subject.task_type.engine.partition(":")
            made = getattr(importlib.import_module(module), name)()
            if not isinstance(made, Engine):
                raise ContractBroken(
                    f"{self.subject.task_type.engine} is not an inferq.consumers.engine.Engine"
                )
            info = made.load()
            if not isinstance(info, EngineInfo):
                raise ContractBroken(f"load() gave {info!r} instead of an inferq.schemas.EngineInfo")
            made.warm_up()
            self._loaded = made
        return self._loaded

    def close(self) -> None:
        """Close the engine, if it is loaded; the next run loads another."""
        engine, self._loaded = self._loaded, None
        if engine is not None:
            engine.close()

    def read(self, sample: Sample) -> Task:
        """The sample's task. Raises InvalidTask, as a gateway would, where its fields will not do."""
        urls = {name: f"https://example.com/{name}" for name in sample.files}
        task = {"task_id": "contract", "task_type": self.subject.task_type.name, **urls, **sample.fields}
        try:
            return self.subject.task_type.task.model_validate_json(json.dumps(task))
        except ValidationError as error:
            raise InvalidTask("; ".join(describe_faults(error))) from error

    @contextmanager
    def run(self, sample: Sample, *, abort_at: int | None = None) -> Iterator[Run]:
        """Run a sample; from its `abort_at`-th look for an abort on, it is told to stop.

        Raises whatever the engine raises, and InvalidTask where the task itself will not do.
        """
        engine, task = self.engine, self.read(sample)
        with tempfile.TemporaryDirectory(prefix="inferq-contract-", dir=self.folder) as folder:
            scratch, reported, abort = Path(folder, "scratch"), list[float](), _Abort(abort_at)
            context = _Watched(
                folder=scratch,
                inputs=dict(_lay_out(sample, scratch)),
                report=lambda fraction, _note: reported.append(fraction),
                abort_requested=abort,
            )
            output = engine.run(task, context)
            known = {i.path for i in context.inputs.values()} | {a.path for a in context.artifacts}
            left = [str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file() and p not in known]
            yield Run(output, tuple(context.artifacts), reported, abort.looks, abort.told, left)

    def text(self, run: Run) -> str:
        """A run's output as the JSON that goes into the result. Raises ContractBroken where it is another."""
        model = self.subject.task_type.output
        try:
            output = run.output if isinstance(run.output, model) else model.model_validate(run.output)
        except ValidationError as error:
            faults = "; ".join(describe_faults(error))
            raise ContractBroken(f"the output is not a {model.__name__}: {faults}") from error
        return output.model_dump_json()

    def check_it_goes_on(self, after: str) -> None:
        """Raise ContractBroken where the first sample cannot be computed any more."""
        try:
            with self.run(self.subject.samples[0]) as run:
                self.text(run)
        except Exception as error:
            raise ContractBroken(f"after {after} the engine fails at the next task: {error!r}") from error


def _lay_out(sample: Sample, scratch: Path) -> Iterator[tuple[str, InputFile]]:
    """The inputs, where and as the worker leaves them: under the names of their fields."""
    for name, source in sample.files.items():
        scratch.mkdir(exist_ok=True)
        content = source if isinstance(source, bytes) else source.read_bytes()
        guess = None if isinstance(source, bytes) else mimetypes.guess_type(source.name)[0]
        (scratch / name).write_bytes(content)
        yield name, InputFile(scratch / name, len(content), guess or "application/octet-stream")
