"""What the jobs of batches share, with a real RabbitMQ of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inferq.broker import BrokerSettings, connect, job_topology
from inferq.consumers.batches.services import BatchServices, Pauses
from inferq.consumers.batches.settings import BatchSettings
from inferq.storage import StorageSettings


@pytest.fixture
def services(fresh_amqp_url: str, redis_url: str, tmp_path: Path) -> Iterator[BatchServices]:
    services = BatchServices(
        BatchSettings(),
        StorageSettings(redis_url=redis_url, store_url=(tmp_path / "store").as_uri(), store_fsync=False),
        BrokerSettings(amqp_url=fresh_amqp_url),
        pauses=Pauses(resend=0.5),
    )
    connection = connect(services.broker, name="test")
    job_topology().apply(connection.channel())
    connection.close()
    yield services
    services.close()
