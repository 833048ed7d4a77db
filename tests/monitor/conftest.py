"""A monitor in this process, with a virtual host and a Redis database of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from inferq.broker import BrokerSettings, job_topology, topology_for
from inferq.broker.connection import connect
from inferq.consumers.monitor.broker_figures import queue_names
from inferq.consumers.monitor.monitor import Monitor
from inferq.consumers.monitor.settings import MonitorSettings
from inferq.storage import StatusIndex, StorageSettings
from tests.broker.conftest import proxied
from tests.conftest import RabbitMQ

__all__ = ["proxied"]

NOBODY = "127.0.0.1:1"
"""An address that nobody answers."""


@pytest.fixture
def own_redis_url(redis_url: str) -> Iterator[str]:
    """A database of the test's own."""
    url = redis_url.removesuffix("/0") + "/7"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
def index(own_redis_url: str) -> Iterator[StatusIndex]:
    index = StatusIndex.from_settings(StorageSettings(redis_url=own_redis_url))
    yield index
    index.close()


@pytest.fixture(scope="module")
def monitored_amqp_url(shared_rabbitmq: RabbitMQ) -> Iterator[str]:
    """A virtual host that has the queues of `echo` and of the jobs: declaring them takes seconds."""
    with shared_rabbitmq.vhost("monitor") as url:
        with closing(connect(BrokerSettings(amqp_url=url), name="test")) as connection:
            channel = connection.channel()
            topology_for(["echo"]).apply(channel)
            job_topology().apply(channel)
        yield url


@pytest.fixture
def channel(monitored_amqp_url: str) -> Iterator[Any]:
    """A channel to its queues, which are emptied afterwards."""
    with closing(connect(BrokerSettings(amqp_url=monitored_amqp_url), name="test")) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
        for name in queue_names(["echo"]):
            channel.queue_purge(name)


@pytest.fixture
def make_monitor(tmp_path: Path, monitored_amqp_url: str, own_redis_url: str) -> Callable[..., Monitor]:
    """Starts a monitor whose rounds the test makes."""

    def make(**urls: str) -> Monitor:
        given = {"redis_url": own_redis_url, "store_url": (tmp_path / "store").as_uri(), **urls}
        amqp_url = given.pop("amqp_url", monitored_amqp_url)
        monitor = Monitor(
            MonitorSettings(monitor_records_interval=1),
            BrokerSettings(amqp_url=amqp_url, amqp_connect_timeout=2),
            StorageSettings(**given),
        )
        monitor.start()
        return monitor

    return make
