"""Celery with careful settings: quorum queue, confirms, late acks, a Redis result backend."""

from __future__ import annotations

import os
import time

from celery import Celery
from kombu import Exchange, Queue

app = Celery("bench", broker=os.environ["BENCH_AMQP_URL"], backend=os.environ["BENCH_REDIS_URL"])
app.conf.update(
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    task_default_queue="bench.celery",
    task_queues=[
        Queue(
            "bench.celery",
            Exchange("bench.celery", type="topic"),
            routing_key="bench.celery",
            queue_arguments={"x-queue-type": "quorum"},
        )
    ],
    task_default_exchange="bench.celery",
    task_default_exchange_type="topic",
    task_default_routing_key="bench.celery",
    task_default_queue_type="quorum",
    worker_detect_quorum_queues=True,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    worker_send_task_events=False,
    result_expires=3600,
)


@app.task(name="clock")
def clock(payload: str) -> dict[str, object]:
    return {"started": time.time(), "payload": payload}
