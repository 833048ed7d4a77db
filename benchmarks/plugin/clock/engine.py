"""The engine, which returns the current time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from clock import ClockOutput, ClockTask
from inferq.consumers.engine import Context, Engine
from inferq.schemas import EngineInfo


class ClockEngine(Engine[ClockTask]):
    batch_size = 32

    def load(self) -> EngineInfo:
        return EngineInfo(name="clock", version="1", model="none", device="cpu")

    def run(self, task: ClockTask, context: Context) -> ClockOutput:
        return ClockOutput(started=time.time(), payload=task.payload)

    def run_batch(self, tasks: Sequence[ClockTask], contexts: Sequence[Context]) -> list[ClockOutput]:
        return [self.run(task, context) for task, context in zip(tasks, contexts, strict=True)]
