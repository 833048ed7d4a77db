"""The GPUs as metrics; the driver is a stand-in, as there is none on the machines of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from prometheus_client import CollectorRegistry

from inferq.consumers.runtime.gpus import Gpus
from tests.waiting import eventually

GIB = 1 << 30


@dataclass
class Driver:
    """Two GPUs: each one's share of time in percent, bytes in use of 80 GiB, and its processes with their bytes."""

    busy: list[int] = field(default_factory=lambda: [75, 0])
    used: list[int] = field(default_factory=lambda: [3 * GIB, 1 << 20])
    processes: list[dict[int, int | None]] = field(default_factory=lambda: [{}, {}])
    samples: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[], []])
    """Of each GPU: a process, the microseconds after the time that was asked for, and its share in percent."""
    failing: dict[str, int] = field(default_factory=dict)
    calls: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Callable[..., Any]] = {
            "Init": lambda: None,
            "Shutdown": lambda: None,
            "DeviceGetCount": lambda: len(self.used),
            "DeviceGetHandleByIndex": lambda number: number,
            "DeviceGetUtilizationRates": lambda number: SimpleNamespace(gpu=self.busy[number]),
            "DeviceGetMemoryInfo": lambda number: SimpleNamespace(
                used=self.used[number], free=80 * GIB - self.used[number], total=80 * GIB
            ),
            "DeviceGetProcessUtilization": lambda number, since: [
                SimpleNamespace(pid=pid, timeStamp=since + age, smUtil=percent)
                for pid, age, percent in self.samples[number]
            ],
            "DeviceGetComputeRunningProcesses": lambda number: [
                SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes[number].items()
            ],
        }
        for name, answer in answers.items():
            patch.setattr(pynvml, f"nvml{name}", self._or_error(name, answer))

    def _or_error(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if name in self.failing:
                raise pynvml.NVMLError(self.failing[name])
            return answer(*arguments)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    driver.install(monkeypatch)
    return driver


def scraped(gpus: Gpus) -> dict[tuple[str, ...], float]:
    """The samples by metric (without `inferq_gpu_`) and label values."""
    registry = CollectorRegistry()
    registry.register(gpus)
    return {
        (sample.name.removeprefix("inferq_gpu_"), *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_each_gpu_has_its_own(driver: Driver) -> None:
    assert scraped(Gpus()) == {
        ("utilization_ratio", "0"): 0.75, ("utilization_ratio", "1"): 0.0,
        ("memory_bytes", "0", "used"): 3 * GIB, ("memory_bytes", "0", "free"): 77 * GIB,
        ("memory_bytes", "1", "used"): 1 << 20, ("memory_bytes", "1", "free"): 80 * GIB - (1 << 20),
    }  # fmt: skip


@pytest.fixture
def child() -> Iterator[int]:
    """A process of this one, as an engine may start."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def test_memory_is_that_of_the_slots_own_processes(driver: Driver, child: int) -> None:
    own = os.getpid()
    driver.processes = [{own: GIB, child: 2 * GIB, 1: 5 * GIB}, {own: None}]
    engines: Mapping[str, int] = {"0": own, "1": 2**22 + 1}  # the second one has just ended
    found = scraped(Gpus(lambda: engines))
    assert {key: value for key, value in found.items() if key[0] == "process_memory_bytes"} == {
        ("process_memory_bytes", "0", "0"): 3 * GIB
    }


def test_a_slot_has_the_latest_share_of_its_processes(driver: Driver, child: int) -> None:
    own = os.getpid()
    driver.processes = [{own: GIB, child: GIB, 1: GIB}, {own: GIB}]
    driver.samples = [[(own, 2, 30), (child, 1, 20), (own, 1, 90), (1, 1, 40)], []]
    gpus = Gpus(lambda: {"0": own})

    def found() -> dict[tuple[str, ...], float]:
        return {key: value for key, value in scraped(gpus).items() if key[0] == "process_utilization_ratio"}

    assert found() == {
        ("process_utilization_ratio", "0", "0"): 0.5,
        ("process_utilization_ratio", "1", "0"): 0.0,
    }
    driver.failing["DeviceGetProcessUtilization"] = pynvml.NVML_ERROR_NOT_FOUND  # nobody used it
    assert set(found().values()) == {0.0}
    driver.failing["DeviceGetProcessUtilization"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert found() == {}


@pytest.mark.parametrize(
    ("call", "error", "left"),
    [
        ("DeviceGetUtilizationRates", pynvml.NVML_ERROR_NOT_SUPPORTED, {"memory_bytes"}),  # a part of a GPU (MIG)
        ("DeviceGetMemoryInfo", pynvml.NVML_ERROR_GPU_IS_LOST, {"utilization_ratio"}),
        ("DeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_NO_PERMISSION, {"utilization_ratio", "memory_bytes"}),
        ("DeviceGetHandleByIndex", pynvml.NVML_ERROR_GPU_IS_LOST, set()),
        ("Init", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, set()),
    ],
)  # fmt: skip
def test_what_the_driver_does_not_say_is_absent_and_takes_no_other_metric_along(
    driver: Driver, call: str, error: int, left: set[str]
) -> None:
    gpus = Gpus()
    driver.failing[call] = error
    assert {key[0] for key in scraped(gpus)} == left
    driver.failing.clear()
    assert {key[0] for key in scraped(gpus)} == {"utilization_ratio", "memory_bytes"}


def test_without_a_driver_it_is_asked_once(driver: Driver) -> None:
    gpus = Gpus()
    driver.failing["Init"] = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert [scraped(gpus) for _ in range(3)] == [{}] * 3
    assert driver.calls == 1


def test_a_driver_that_hangs_delays_no_scrape_and_is_asked_by_one_thread(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, asked = threading.Event(), []

    def hang() -> int:
        asked.append(threading.current_thread())
        goes_on.wait(60)
        return 2

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", hang)
    gpus = Gpus(patience=0.01)
    assert [scraped(gpus) for _ in range(3)] == [{}] * 3
    goes_on.set()
    (thread,) = eventually(lambda: asked)
    thread.join(60)
    monkeypatch.setattr(gpus, "_patience", 60)
    assert ("utilization_ratio", "1") in scraped(gpus)
