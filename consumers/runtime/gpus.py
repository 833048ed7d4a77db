"""How busy and how full the GPUs are: what NVIDIA's driver says, asked at each scrape."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

import psutil
import pynvml  # type: ignore[import-untyped]
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from inferq.schemas.monitor import GpuMemory

_PATIENCE_SECONDS = 1.0
"""How long a scrape waits for the driver. One that hangs must not take the other metrics along."""

_LATELY_SECONDS = 2.0
"""Of which time the shares of processes are. The driver takes a sample in one sixth of a second to one second."""


class _Families(NamedTuple):
    utilization: GaugeMetricFamily
    memory: GaugeMetricFamily
    of_engines: GaugeMetricFamily
    engines_busy: GaugeMetricFamily


class Gpus(Collector):
    """The GPUs that this machine or container sees; no metric at all where there is none.

    `engines` gives the process id of each slot's engine, by the slot's number. What the driver does not say is
    absent: a GPU that is shared (MIG) has no utilisation, and a container may not see whose memory it is.
    """

    def __init__(
        self, engines: Callable[[], Mapping[str, int]] = dict, *, patience: float = _PATIENCE_SECONDS
    ) -> None:
        self._engines = engines
        self._patience = patience
        self._lock = threading.Lock()
        self._reading: Future[_Families | None] | None = None
        self._no_driver = False

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from self._families() or ()

    def memory(self) -> tuple[GpuMemory, ...] | None:
        """The memory of each GPU; None if the driver names none."""
        bytes_of: dict[str, dict[str, int]] = {}
        if (families := self._families()) is not None:
            for sample in families.memory.samples:
                bytes_of.setdefault(sample.labels["gpu"], {})[sample.labels["state"]] = int(sample.value)
        found = (
            GpuMemory(gpu=gpu, used_bytes=by["used"], total_bytes=by["used"] + by["free"])
            for gpu, by in bytes_of.items()
        )
        return tuple(found) or None

    def _families(self) -> _Families | None:
        """What the driver says now; None if it says nothing in time."""
        if self._no_driver:
            return None
        with self._lock:
            if self._reading is None or self._reading.done():
                self._reading = Future()
                threading.Thread(target=self._read, args=[self._reading], name="gpus", daemon=True).start()
            reading = self._reading
        with suppress(TimeoutError):
            return reading.result(self._patience)
        return None

    def _read(self, reading: Future[_Families | None]) -> None:
        found: _Families | None = None
        try:
            found = self._metrics()
        except pynvml.NVMLError as error:
            self._no_driver = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        finally:
            reading.set_result(found)

    def _metrics(self) -> _Families:
        utilization = GaugeMetricFamily(
            "inferq_gpu_utilization_ratio",
            "Share of the last sampling period in which any process used the GPU.",
            labels=["gpu"],
        )
        memory = GaugeMetricFamily(
            "inferq_gpu_memory_bytes",
            "GPU memory by state: used (by all processes), free.",
            labels=["gpu", "state"],
        )
        own = GaugeMetricFamily(
            "inferq_gpu_process_memory_bytes",
            "GPU memory that the engine of a slot uses.",
            labels=["gpu", "slot"],
        )
        own_time = GaugeMetricFamily(
            "inferq_gpu_process_utilization_ratio",
            "Share of the GPU's time that the engine of a slot used lately.",
            labels=["gpu", "slot"],
        )
        pynvml.nvmlInit()
        try:
            slots = {pid: slot for slot, root in self._engines().items() for pid in _with_children(root)}
            for number in range(pynvml.nvmlDeviceGetCount()):
                gpu, handle = str(number), pynvml.nvmlDeviceGetHandleByIndex(number)
                if (rates := _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)) is not None:
                    utilization.add_metric([gpu], rates.gpu / 100)
                if (info := _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)) is not None:
                    memory.add_metric([gpu, "used"], info.used)
                    memory.add_metric([gpu, "free"], info.free)
                used: dict[str, int] = {}
                busy: dict[str, float] = {}
                shares = _shares_of_time(handle)
                for process in _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ():
                    if (slot := slots.get(process.pid)) is None:
                        continue
                    if process.usedGpuMemory is not None:
                        used[slot] = used.get(slot, 0) + process.usedGpuMemory
                    if shares is not None:
                        busy[slot] = min(1.0, busy.get(slot, 0.0) + shares.get(process.pid, 0.0))
                for slot, count in used.items():
                    own.add_metric([gpu, slot], count)
                for slot, share in busy.items():
                    own_time.add_metric([gpu, slot], share)
        finally:
            pynvml.nvmlShutdown()
        return _Families(utilization, memory, own, own_time)


def _ask(call: Callable[[Any], Any], handle: Any) -> Any:
    """The driver's answer; None if this GPU does not say it, or has fallen off its bus."""
    try:
        return call(handle)
    except pynvml.NVMLError:
        return None


def _shares_of_time(handle: Any) -> dict[int, float] | None:
    """Each process's share of the GPU's latest time, by process id; None if the driver does not say.

    A process that did not use the GPU since then is left out.
    """
    since = int((time.time() - _LATELY_SECONDS) * 1e6)
    try:
        samples = pynvml.nvmlDeviceGetProcessUtilization(handle, since)
    except pynvml.NVMLError as error:
        nobody = error.value in {pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_SUCCESS}
        return {} if nobody else None
    return {sample.pid: sample.smUtil / 100 for sample in sorted(samples, key=lambda one: one.timeStamp)}


def _with_children(pid: int) -> Sequence[int]:
    with suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]
