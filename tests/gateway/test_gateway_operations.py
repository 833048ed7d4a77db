"""`/v1/stats`, `/v1/demand` and `/v1/workers`: what each tenant sees, and what is unknown."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inferq.producer.client.sync_client import Client
from inferq.schemas.monitor import LateNight, QueueFigures, Stats, TaskInHand
from inferq.storage.figures import MonitorFigures
from inferq.storage.workers import WorkerRegistry
from tests.gateway.conftest import FakePublisher, Gateway, running
from tests.gateway.edges import validator_of
from tests.storage.test_workers import worker

NOW = datetime.now(UTC)


def test_the_figures_of_the_monitor_are_answered(gateway: Gateway, openapi_document: dict[str, Any]) -> None:
    lane = QueueFigures(task_type="echo", priority="normal", ready=3, oldest_seconds=1.5)
    late = tuple(LateNight(schedule=f"of-{of}", tenant=of, seconds=9) for of in (gateway.tenant, "another"))
    stats = Stats(
        at=NOW, services={"redis": True}, queues=(lane,), late_nights=late, unknown={"nights": "why"}
    )
    MonitorFigures(gateway.status).save(stats, "{}", seconds=60)
    answer = gateway.http.get("/v1/stats")
    assert answer.status_code == 200
    document = answer.json()
    assert document["queues"] == [
        {
            "task_type": "echo", "priority": "normal", "ready": 3, "unacked": None, "consumers": None,
            "oldest_seconds": 1.5, "taken": None,
        }
    ]  # fmt: skip
    assert [night["schedule"] for night in document["late_nights"]] == [f"of-{gateway.tenant}"]
    assert document["unroutable_messages"] is None
    assert document["unknown"] == {"nights": "why"}
    assert not list(validator_of(openapi_document, "Stats").iter_errors(document))
    with Client(gateway.url, gateway.key) as client:
        assert client.stats().queues == (lane,)
    gateway.status.write(lambda redis: redis.delete("inferq:monitor"))
    document = gateway.http.get("/v1/stats").json()
    assert document["queues"] is None
    assert "inferq monitor" in document["unknown"]["queues"]


def test_the_demand_comes_from_the_figures(gateway: Gateway, openapi_document: dict[str, Any]) -> None:
    lane = QueueFigures(task_type="echo", priority="normal", ready=30, unacked=1, oldest_seconds=1)
    stats = Stats(
        at=NOW, queues=(lane,), unfed_tasks={}, task_seconds={"echo": 10}, retry_messages={}, workers=()
    )
    MonitorFigures(gateway.status).save(stats, "{}", seconds=60)
    document = gateway.http.get("/v1/demand", params={"target_wait": 10}).json()
    # KEDA reads `types.echo.workers`. The slot in use and 15 others start two tasks each within 10 s.
    assert document["types"]["echo"]["workers"] == 1 + 15
    assert not list(validator_of(openapi_document, "Demand").iter_errors(document))
    assert gateway.http.get("/v1/demand").json()["target_wait"] == 300
    assert gateway.http.get("/v1/demand", params={"target_wait": -1}).status_code == 422
    with Client(gateway.url, gateway.key) as client:
        assert client.demand(target_wait=10).types["echo"].workers == 16
        assert client.demand().target_wait == 300
    gateway.status.write(lambda redis: redis.delete("inferq:monitor"))
    document = gateway.http.get("/v1/demand").json()
    assert document["types"] == {}
    assert "inferq monitor" in document["unknown"]["types"]


def test_ids_of_tasks_are_those_of_the_callers_tenant(
    gateway: Gateway, openapi_document: dict[str, Any]
) -> None:
    tasks = tuple(
        TaskInHand(tenant=of, task_id=f"of-{of}", priority="normal", since=NOW)
        for of in (gateway.tenant, "another")
    )
    registry = WorkerRegistry(gateway.status)
    registry.beat(worker("ids", tasks=tasks, busy=2, in_hand={"normal": 2}), {})
    answer = gateway.http.get("/v1/workers")
    document = answer.json()
    (found,) = [item for item in document["items"] if item["worker_id"] == "ids"]
    assert [task["task_id"] for task in found["tasks"]] == [f"of-{gateway.tenant}"]
    assert (found["busy"], found["in_hand"]) == (2, {"normal": 2})
    assert "another" not in answer.text
    assert not list(validator_of(openapi_document, "WorkerList").iter_errors(document))
    with gateway.someone() as other, Client(gateway.url, gateway.key) as client:
        (seen,) = [item for item in other.get("/v1/workers").json()["items"] if item["worker_id"] == "ids"]
        assert seen["tasks"] == []
        items = client.workers().items
        assert items is not None
        assert "ids" in [item.worker_id for item in items]
    registry.end("ids", {})


def test_without_redis_everything_is_unknown_and_nothing_zero(tmp_path: Path) -> None:
    with running(tmp_path, redis_url="redis://127.0.0.1:1/0", publisher=FakePublisher()) as gateway:
        stats = gateway.http.get("/v1/stats")
        assert stats.status_code == 200
        known = {
            name: value for name, value in stats.json().items() if value is not None and name != "unknown"
        }
        assert known == {}
        assert set(stats.json()["unknown"].values()) == {"Redis is unavailable"}
        demand = gateway.http.get("/v1/demand").json()
        assert (demand["types"], demand["unknown"]["types"]) == ({}, "Redis is unavailable")
        workers = gateway.http.get("/v1/workers").json()
        assert workers == {"items": None, "unknown": "Redis is unavailable"}


def test_a_key_is_needed(gateway: Gateway) -> None:
    for path in ("/v1/stats", "/v1/demand", "/v1/workers"):
        assert gateway.get_openly(path).status_code == 401
        assert gateway.http.head(path).status_code == 200
