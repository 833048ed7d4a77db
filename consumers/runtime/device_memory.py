"""How much memory is in use on the GPUs: what NVIDIA's driver says, asked at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

import pynvml  # type: ignore[import-untyped]
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class DeviceMemory(Collector):
    """The memory of each GPU that this machine or container sees; no metric at all where there is none.

    It counts all processes: from inside a container the driver does not tell whose memory it is.
    """

    def collect(self) -> Iterator[GaugeMetricFamily]:
        used = GaugeMetricFamily(
            "inferq_device_memory_used_bytes", "GPU memory in use, by all processes.", labels=["device"]
        )
        total = GaugeMetricFamily("inferq_device_memory_bytes", "GPU memory there is.", labels=["device"])
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        try:
            for number in range(pynvml.nvmlDeviceGetCount()):
                memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
                used.add_metric([str(number)], memory.used)
                total.add_metric([str(number)], memory.total)
        except pynvml.NVMLError:
            return  # a GPU that has fallen off its bus must not take the other metrics along
        finally:
            pynvml.nvmlShutdown()
        yield used
        yield total
