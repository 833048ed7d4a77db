"""The engine, which waits as a worker's process waits for its GPU: without the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

from inferq.consumers.engine import Context, Engine
from inferq.schemas import EngineInfo
from simgpu import SimGpuOutput, SimGpuSettings, SimGpuTask


class SimGpuEngine(Engine[SimGpuTask]):
    batch_size = 64

    def load(self) -> EngineInfo:
        self._settings = SimGpuSettings.load()
        return EngineInfo(name="simgpu", version="1", model="none", device="cpu")

    def run(self, task: SimGpuTask, context: Context) -> SimGpuOutput:
        return self.run_batch([task], [context])[0]

    def run_batch(self, tasks: Sequence[SimGpuTask], contexts: Sequence[Context]) -> list[SimGpuOutput]:
        began, clock = time.time(), time.perf_counter()
        time.sleep(self._settings.simgpu_batch + self._settings.simgpu_task * len(tasks))
        output = SimGpuOutput(began=began, seconds=time.perf_counter() - clock, batch=len(tasks))
        return [output] * len(tasks)
