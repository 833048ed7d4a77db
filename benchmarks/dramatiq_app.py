"""Dramatiq with confirmed publishes, prefetch=1, one thread, its classic queue and a Redis result backend."""

from __future__ import annotations

import os
import time

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

broker = RabbitmqBroker(url=os.environ["BENCH_AMQP_URL"], confirm_delivery=True)
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BENCH_REDIS_URL"])))
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="bench.dramatiq", store_results=True)
def clock(payload: str) -> dict[str, object]:
    return {"started": time.time(), "payload": payload}
