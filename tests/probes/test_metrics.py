"""All metrics of all parts: they are those of docs/metrics.md, and no label of theirs grows without bound."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from inferq.consumers.probes.ends import TaskEnds
from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.producer.gateway.access import Access
from inferq.producer.gateway.metrics import Metrics
from inferq.schemas import ErrorInfo, Result, Timings
from inferq.schemas.metrics import SECONDS, BoundedLabel
from tests.probes.registries import PARTS, exported, install_a_gpu

_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_lists_every_metric_with_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    install_a_gpu(monkeypatch)
    cells = [line.split(" | ")[0] for line in _PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    listed = {
        name: frozenset(labels.split(",")) if labels else frozenset()
        for cell in cells
        for name, labels in re.findall(r"`(inferq_\w+)(?:\{([\w,]+)\})?`", cell)
    }
    assert listed == {name: labels for part in PARTS.values() for name, labels in exported(part()).items()}


@pytest.mark.parametrize("part", PARTS)
def test_every_histogram_of_seconds_has_the_same_buckets(part: str) -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 3600)
    assert all(after / before <= 3 for before, after in pairwise(SECONDS))
    for collector in PARTS[part]()._collector_to_names:
        if isinstance(collector, Histogram) and collector._name.endswith("_seconds"):
            assert tuple(collector._kwargs["buckets"]) == SECONDS, collector


_VALUES = {
    # From lists in our own code.
    "outcome": 8, "stage": 5, "status": 60, "service": 4, "reason": 3, "for": 3, "state": 4, "method": 8,
    # From settings, files and hardware.
    "slot": 64, "gpu": 16, "schedule": 1000, "route": 100, "track": 1,
    # Of senders and plug-ins: beyond a limit they are `other`.
    "tenant": 51, "error_code": 102, "task_type": 101,
}  # fmt: skip
"""How many values each label may have. `status` is that of a task or of HTTP."""


def test_each_label_is_known_to_be_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    install_a_gpu(monkeypatch)
    labels = {label for part in PARTS.values() for names in exported(part()).values() for label in names}
    assert labels <= _VALUES.keys()


def _ended(number: int, **more: Any) -> Result:
    return Result.model_validate(
        {
            "task_id": "t", "task_type": "echo", "status": "failed", "attempts": 1,
            "tenant": f"tenant-{number}", "finished_at": datetime.now(UTC),
            "error": ErrorInfo(code=f"code {number}" if number % 2 else f"code_{number}", message="", retryable=False),
            **more,
        }
    )  # fmt: skip


def _most(registry: CollectorRegistry) -> dict[str, set[str]]:
    """The values of each label, of the metric that has most of them."""
    most: dict[str, set[str]] = {}
    for family in registry.collect():
        for label in {label for sample in family.samples for label in sample.labels}:
            values = {sample.labels[label] for sample in family.samples if label in sample.labels}
            most[label] = max(most.get(label, set()), values, key=len)
    return most


def test_what_senders_and_plug_ins_choose_makes_no_more_series() -> None:
    worker, jobs, gateway = WorkerMetrics(), CollectorRegistry(), Metrics()
    ends = TaskEnds(jobs)
    for number in range(1000):
        worker.ended(_ended(number))
        worker.failed("echo", "inference", f"code_{number}")
        worker.computed(f"tenant-{number}", "echo", 1.0)
        ends.count(_ended(number, task_type=f"type_{number}"))
        gateway.cancelled(f"type_{number}")
    asyncio.run(_requests(Access(_answer, metrics=gateway, root_path="")))
    for registry, flooded in (
        (worker.registry, ("tenant", "error_code")), (jobs, ("task_type", "error_code")),
        (gateway._registry, ("method", "route", "task_type")),
    ):  # fmt: skip
        values = _most(registry)
        for label in flooded:
            assert 1 <= len(values[label]) <= _VALUES[label], label
            assert values[label] & {"other", "unmatched"}, label  # nothing is lost
    count = worker.registry.get_sample_value
    assert count("inferq_tenant_tasks_total", {"tenant": "other", "task_type": "echo"}) == 950
    assert count("inferq_tenant_tasks_total", {"tenant": "tenant-7", "task_type": "echo"}) == 1
    assert count("inferq_tenant_engine_seconds_total", {"tenant": "other", "task_type": "echo"}) == 950


@pytest.mark.parametrize("track", ["", "canary"])
def test_a_track_is_a_label_of_the_attempts_and_adds_no_series(track: str) -> None:
    worker = WorkerMetrics(track=track)
    worker.settled("echo", "retried")
    worker.failed("echo", "inference", "engine_error")
    worker.observe("echo", Timings(inference=1.0))
    named = {"track": track} if track else {}
    samples = [sample for family in worker.registry.collect() for sample in family.samples]
    assert {
        sample.name: sample.labels
        for sample in samples
        if sample.name in ("inferq_worker_tasks_total", "inferq_task_failures_total")
    } == {
        "inferq_worker_tasks_total": {"task_type": "echo", "outcome": "retried", **named},
        "inferq_task_failures_total": {
            "task_type": "echo", "stage": "inference", "error_code": "engine_error", **named,
        },
    }  # fmt: skip
    counts = [sample for sample in samples if sample.name == "inferq_worker_stage_seconds_count"]
    assert {tuple(sample.labels) for sample in counts} == {("task_type", "stage", *named)}
    assert len(counts) == 3


async def _answer(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})


async def _requests(access: Access) -> None:
    async def nothing(*_message: Any) -> Any:
        return None

    for number in range(1000):
        scope = {
            "type": "http",
            "method": f"METHOD{number}",
            "path": f"/path/{number}",
            "headers": [],
            "state": {},
        }
        await access(scope, nothing, nothing)


def test_a_text_that_is_no_name_is_no_value_of_a_label() -> None:
    bound = BoundedLabel(2)
    assert [bound(text) for text in ("a", "", "some text", "x" * 65, "b", "c", "a")] == [
        *("a", "", "other", "other", "b", "other", "a")
    ]
