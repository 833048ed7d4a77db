"""The registry of workers in Redis."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from inferq.schemas.monitor import WorkerInfo
from inferq.storage import StatusIndex, StatusOutage, StorageSettings
from inferq.storage.workers import LIVES_SECONDS, MAX_WORKERS, WorkerRegistry
from tests.storage.conftest import RedisServer


def worker(worker_id: str = "h-1-a", **fields: Any) -> WorkerInfo:
    about = {
        "name": "w", "host": "h", "pid": 1, "task_type": "echo", "lanes": ("normal",), "state": "idle",
        "slots": 1, "busy": 0, "version": "0", "since": datetime.now(UTC),
    }  # fmt: skip
    return WorkerInfo.model_validate({"worker_id": worker_id, **about, **fields})


@pytest.fixture
def registry(index: StatusIndex) -> WorkerRegistry:
    return WorkerRegistry(index)


@pytest.fixture
def commands(redis_client: redis.Redis) -> Callable[[], dict[str, int]]:
    """How often Redis ran each command that a client sent or a script called."""

    def counted() -> dict[str, int]:
        stats: Any = redis_client.info("commandstats")
        return {name.removeprefix("cmdstat_"): fact["calls"] for name, fact in stats.items()}

    redis_client.config_resetstat()
    return counted


def test_a_worker_is_listed_as_its_last_heartbeat_says(registry: WorkerRegistry) -> None:
    registry.beat(worker("a"), {})
    registry.beat(worker("b"), {("echo", "normal"): 3})
    registry.beat(worker("a", state="busy", busy=1, in_hand={"normal": 1}), {("echo", "normal"): 1})
    found = registry.read()
    assert {(w.worker_id, w.state) for w in found.workers} == {("a", "busy"), ("b", "idle")}
    assert all(w.seen_seconds_ago is not None and 0 <= w.seen_seconds_ago < 60 for w in found.workers)
    assert (found.taken_of("echo", "normal"), found.taken_of("echo", "high")) == (4, 0)
    assert registry.end("a", {("echo", "normal"): 2})
    found = registry.read()
    assert [w.worker_id for w in found.workers] == ["b"]
    assert found.taken_of("echo", "normal") == 6


def test_a_worker_that_is_silent_vanishes_and_leaves_nothing(
    registry: WorkerRegistry, redis_client: redis.Redis
) -> None:
    registry.beat(worker("dead"), {})
    registry.beat(worker("live"), {})
    assert 0 < redis_client.ttl("inferq:w:dead") <= LIVES_SECONDS
    redis_client.delete("inferq:w:dead")  # as at the end of its time
    assert [w.worker_id for w in registry.read().workers] == ["live"]
    redis_client.zadd("inferq:workers", {"dead": 1.0})
    registry.beat(worker("live"), {})
    assert redis_client.zrange("inferq:workers", 0, -1) == ["live"]
    for key in redis_client.scan_iter():
        assert redis_client.ttl(key) > 0, key


def test_a_heartbeat_is_one_round_trip_and_a_listing_scans_nothing(
    registry: WorkerRegistry, redis_client: redis.Redis, commands: Callable[[], dict[str, int]]
) -> None:
    registry.beat(worker(), {})
    registry.read()
    redis_client.mset({f"inferq:t:default:{number}": "x" for number in range(1000)})
    before = commands()
    registry.beat(worker(), {("echo", "normal"): 1})
    registry.read()
    now = commands()
    assert now["evalsha"] - before["evalsha"] == 2
    made = {name: now[name] - before.get(name, 0) for name in now if name != "info"}
    assert not made.keys() & {"scan", "keys"}
    assert sum(made.values()) < 25


def test_a_listing_is_bounded(registry: WorkerRegistry, redis_client: redis.Redis) -> None:
    redis_client.zadd("inferq:workers", {f"w{number}": number for number in range(MAX_WORKERS + 50)})
    registry.beat(worker("newest"), {})
    assert [w.worker_id for w in registry.read().workers] == ["newest"]


def test_a_record_of_another_version_is_left_out(registry: WorkerRegistry, redis_client: redis.Redis) -> None:
    registry.beat(worker("a"), {})
    registry.beat(worker("b"), {})
    redis_client.set("inferq:w:a", '{"worker_id": "a"}')
    assert [w.worker_id for w in registry.read().workers] == ["b"]


def test_a_right_that_is_missing_is_logged_now_and_then(
    redis_client: redis.Redis, shared_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_client.acl_setuser(
        "less", enabled=True, passwords=["+x"], keys=["inferq:*"], commands=["+evalsha", "+set"]
    )
    url = shared_redis.url.replace("redis://", "redis://less:x@")
    index = StatusIndex.from_settings(StorageSettings(redis_url=url))
    try:
        for _ in range(2):
            assert not WorkerRegistry(index).beat(worker(), {})
        assert [record.message for record in caplog.records if "refused a command" in record.message]
        assert len(caplog.records) == 1
        assert index.unavailable_for is None
    finally:
        index.close()
        redis_client.acl_deluser("less")


def test_a_heartbeat_that_redis_does_not_take_is_no_outage(own_redis: RedisServer) -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url=own_redis.url, redis_timeout=0.2))
    registry = WorkerRegistry(index)
    assert registry.beat(worker(), {})
    own_redis.freeze(True)
    assert not registry.beat(worker(), {})
    assert index.unavailable_for is None, "the worker must not pause for a heartbeat"
    own_redis.freeze(False)
    own_redis.kill()
    assert not registry.beat(worker(), {})
    assert index.unavailable_for is None
    with pytest.raises(StatusOutage):
        registry.read()
    assert not registry.beat(worker(), {})
    index.close()
