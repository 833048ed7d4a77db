"""The echo engine."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

from inferq.consumers.echo import EchoOutput, EchoTask
from inferq.engine import Context, Engine
from inferq.schemas import EngineInfo

_STEP = 0.05
"""How often the run checks whether it has to stop, in seconds."""


class EchoEngine(Engine[EchoTask]):
    """Waits for the task's delay, reports progress, and returns the payload."""

    batch_size = 32

    def load(self) -> EngineInfo:
        return EngineInfo(name="echo", version="1", model="none", device="cpu")

    def run(self, task: EchoTask, context: Context) -> EchoOutput:
        if task.delay:
            self._wait(task.delay, context)
        return EchoOutput(payload=task.payload)

    def batch_key(self, task: EchoTask) -> Hashable:
        return task.task_id if task.delay else None  # two delays would add up

    def run_batch(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> list[EchoOutput]:  # noqa: ARG002
        return [EchoOutput(payload=task.payload) for task in tasks]

    @staticmethod
    def _wait(delay: float, context: Context) -> None:
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < delay:
            context.check_abort()
            context.progress(waited / delay, "waiting")
            time.sleep(min(_STEP, delay - waited))
