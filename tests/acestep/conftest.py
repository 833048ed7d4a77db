"""A loaded music engine, and a way to run tasks through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from inferq.consumers.acestep import AceStepOutput, AceStepTask
from inferq.consumers.acestep.engine import AceStepEngine
from inferq.consumers.engine import Context


def acestep_task(prompt: str = "calm piano, slow", **fields: Any) -> AceStepTask:
    return AceStepTask.model_validate(
        {"task_id": "t", "task_type": "acestep", "prompt": prompt, "duration": 2, "seed": 1} | fields
    )


@dataclass
class Run:
    """What a run gave and left."""

    output: AceStepOutput
    context: Context
    reports: list[tuple[float, str]]
    sound: NDArray[np.float64] = field(repr=False)

    def path(self, name: str) -> Path:
        return next(artifact.path for artifact in self.context.artifacts if artifact.name == name)


@dataclass
class Runner:
    """Runs tasks through an engine, each in a folder of its own."""

    folder: Path
    count: int = 0

    def context(self, reports: list[tuple[float, str]], abort: Callable[[], bool]) -> Context:
        self.count += 1
        return Context(
            folder=self.folder / str(self.count),
            inputs={},
            report=lambda fraction, note: reports.append((fraction, note)),
            abort_requested=abort,
        )

    def __call__(
        self, engine: AceStepEngine, task: AceStepTask, abort: Callable[[], bool] = lambda: False
    ) -> Run:
        reports: list[tuple[float, str]] = []
        context = self.context(reports, abort)
        output = engine.run(task, context)
        sound, _ = soundfile.read(context.artifacts[0].path)
        return Run(output, context, reports, sound)


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture(scope="session")
def preview() -> Iterator[AceStepEngine]:
    """The default engine, loaded once."""
    engine = AceStepEngine()
    engine.load()
    yield engine
    engine.close()
