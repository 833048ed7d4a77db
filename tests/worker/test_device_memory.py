"""The GPU's memory as a metric; the driver is a stand-in, as there is none on the machines of the tests."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from inferq.consumers.runtime.device_memory import DeviceMemory


def scraped() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(DeviceMemory())
    return registry


def metrics() -> str:
    return generate_latest(scraped()).decode()


def used(device: str) -> float | None:
    return scraped().get_sample_value("inferq_device_memory_used_bytes", {"device": device})


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    in_use = [3 << 30, 1 << 20]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(in_use))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda number: SimpleNamespace(used=in_use[number], total=80 << 30)
    )
    return in_use


def test_each_gpu_has_its_own(two_gpus: list[int]) -> None:
    assert (used("0"), used("1"), used("2")) == (3 << 30, 1 << 20, None)
    two_gpus[1] = 2 << 20
    assert used("1") == 2 << 20
    assert scraped().get_sample_value("inferq_device_memory_bytes", {"device": "0"}) == 80 << 30


def test_a_gpu_that_is_gone_takes_no_other_metric_along(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_number: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    assert "inferq_device_memory" not in metrics()


def test_without_a_driver_there_is_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert "inferq_device_memory" not in metrics()
