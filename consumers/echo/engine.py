"""The echo engine."""

from __future__ import annotations

import time

from inferq.consumers.echo import EchoOutput, EchoTask
from inferq.engine import Context, Engine
from inferq.schemas import EngineInfo

_STEP = 0.05
"""How often the run checks whether it has to stop, in seconds."""


class EchoEngine(Engine[EchoTask]):
    """Waits for the task's delay, reports progress, and returns the payload."""

    def load(self) -> EngineInfo:
        return EngineInfo(name="echo", version="1", model="none", device="cpu")

    def run(self, task: EchoTask, context: Context) -> EchoOutput:
        if task.delay:
            self._wait(task.delay, context)
        return EchoOutput(payload=task.payload)

    @staticmethod
    def _wait(delay: float, context: Context) -> None:
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < delay:
            context.check_abort()
            context.progress(waited / delay, "waiting")
            time.sleep(min(_STEP, delay - waited))
