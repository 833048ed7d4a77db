"""The engine, which returns the current time."""

from __future__ import annotations

import time

from clock import ClockOutput, ClockTask
from inferq.consumers.engine import Context, Engine
from inferq.schemas import EngineInfo


class ClockEngine(Engine[ClockTask]):
    def load(self) -> EngineInfo:
        return EngineInfo(name="clock", version="1", model="none", device="cpu")

    def run(self, task: ClockTask, context: Context) -> ClockOutput:
        return ClockOutput(started=time.time(), payload=task.payload)
