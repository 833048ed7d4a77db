"""The metrics of every part, as its code makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pynvml
import pytest
from prometheus_client import CollectorRegistry

from inferq.consumers.callbacks.metrics import CallbackMetrics
from inferq.consumers.probes.ends import TaskEnds
from inferq.consumers.runtime.gpus import Gpus
from inferq.consumers.scale_in.costs import PodFacts
from inferq.consumers.scale_in.metrics import GuardMetrics
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.producer.gateway.metrics import Metrics
from inferq.producer.nightly.metrics import BeatMetrics


def _worker() -> CollectorRegistry:
    metrics = WorkerMetrics(track="canary")
    metrics.add_engine("echo")
    metrics.registry.register(Gpus(lambda: {"0": 1}))
    return metrics.registry


def _callbacks() -> CollectorRegistry:
    registry = CollectorRegistry()
    TaskEnds(registry)
    CallbackMetrics(registry)
    return registry


def _scale_in_guard() -> CollectorRegistry:
    metrics = GuardMetrics()
    metrics.count([PodFacts("w", "u", "rs", "echo", True, None)], {})
    return metrics.registry


PARTS: Mapping[str, Callable[[], CollectorRegistry]] = {
    "worker": _worker,
    "gateway": lambda: Metrics()._registry,
    "callbacks": _callbacks,
    "beat": lambda: BeatMetrics().registry,
    "scale-in-guard": _scale_in_guard,
}
"""The registry of each part. A new part, and a metric that another place registers, is added here."""


def install_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """A driver that knows one GPU, with process 1 on it."""
    answers = {
        "Init": None, "Shutdown": None, "DeviceGetCount": 1, "DeviceGetHandleByIndex": 0,
        "DeviceGetUtilizationRates": SimpleNamespace(gpu=50),
        "DeviceGetProcessUtilization": [SimpleNamespace(pid=1, timeStamp=1, smUtil=40)],
        "DeviceGetMemoryInfo": SimpleNamespace(used=1, free=2),
        "DeviceGetComputeRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=1)],
    }  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(pynvml, f"nvml{name}", lambda *_, answer=answer: answer)


def exported(registry: CollectorRegistry) -> dict[str, frozenset[str]]:
    """The labels of each of our metrics, by the name that a query uses; of a histogram, by its own."""
    found = {}
    for collector in list(registry._collector_to_names):
        declared = set(getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            if family.name.startswith("inferq_"):
                name = f"{family.name}_total" if family.type == "counter" else family.name
                of_samples = {label for sample in family.samples for label in sample.labels}
                found[name] = frozenset((declared | of_samples) - {"le"})
    return found
