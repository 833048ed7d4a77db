"""The drills of docs/deploy/backup.md: Redis or RabbitMQ loses everything, and no result is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.conftest import RabbitMQ, Redis
from tests.gateway.conftest import Gateway, running
from tests.waiting import eventually
from tests.worker.conftest import Site, site_at

TASKS = [f"drill-{number}" for number in range(8)]


@pytest.fixture
def site(shared_rabbitmq: RabbitMQ, fresh_amqp_url: str, redis_node: Redis, tmp_path: Path) -> Iterator[Site]:
    with site_at(fresh_amqp_url, shared_rabbitmq, redis_node.url, tmp_path) as site:
        yield site


@pytest.fixture
def gateway(site: Site, fresh_amqp_url: str, tmp_path: Path) -> Iterator[Gateway]:
    with running(
        tmp_path,
        redis_url=site.env["INFERQ_REDIS_URL"],
        amqp_url=fresh_amqp_url,
        storage={"store_url": site.env["INFERQ_STORE_URL"]},
    ) as gateway:
        eventually(lambda: gateway.http.get("/readyz").status_code == 200)
        yield gateway


def submit(gateway: Gateway, task_id: str) -> httpx.Response:
    task = {"task_type": "echo", "payload": task_id, "delay": 0.3}
    return gateway.http.put(f"/v1/tasks/{task_id}", json=task)


def end_of(site: Site, gateway: Gateway, task_id: str) -> str | None:
    """When the task ended, by its result in the object store."""
    result = site.results.load(gateway.tenant, task_id)
    return str(result.finished_at) if result is not None else None


def test_redis_is_wiped_and_restarted_and_every_task_ends(
    site: Site, gateway: Gateway, redis_node: Redis
) -> None:
    assert {submit(gateway, task_id).status_code for task_id in TASKS} == {202}
    site.worker("echo")
    eventually(lambda: end_of(site, gateway, TASKS[0]))
    with redis.Redis.from_url(redis_node.url) as connection:
        connection.flushall()
    redis_node.kill()
    redis_node.start()
    eventually(lambda: all(end_of(site, gateway, task_id) for task_id in TASKS))
    for task_id in TASKS:
        answer = gateway.http.get(f"/v1/tasks/{task_id}/result")
        assert (answer.status_code, answer.json()["output"]) == (200, {"payload": task_id})


def test_rabbitmq_is_replaced_and_tasks_that_are_submitted_again_end_once(
    site: Site, gateway: Gateway, shared_rabbitmq: RabbitMQ
) -> None:
    assert {submit(gateway, task_id).status_code for task_id in TASKS} == {202}
    worker = site.worker("echo", INFERQ_BATCH_SIZE="1")  # so that some are still queued when it stops
    eventually(lambda: end_of(site, gateway, TASKS[1]))
    assert worker.stop() == 0
    ended = {task_id: at for task_id in TASKS if (at := end_of(site, gateway, task_id))}
    assert 2 <= len(ended) < len(TASKS)

    vhost = site.env["INFERQ_AMQP_URL"].rpartition("/")[2]
    shared_rabbitmq.remove_vhost(vhost)
    shared_rabbitmq.add_vhost(vhost)
    site.forget()  # otherwise the records say that the lost tasks are queued
    site.worker("echo")
    eventually(lambda: gateway.http.get("/readyz").status_code == 200)
    eventually(lambda: all(submit(gateway, task_id).status_code in (200, 202) for task_id in TASKS))
    eventually(lambda: all(end_of(site, gateway, task_id) for task_id in TASKS))
    assert {task_id: end_of(site, gateway, task_id) for task_id in ended} == ended
    assert all(site.depth(f"inference.echo.{lane}") == 0 for lane in ("high", "normal", "low"))
