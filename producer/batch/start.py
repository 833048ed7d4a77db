"""Starts a batch: records it once, and publishes the job that feeds it."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from inferq.broker import Message, feed_message
from inferq.schemas import Batch
from inferq.schemas.trace_context import TraceContext
from inferq.storage import BatchStore


def start(
    batch: Batch,
    batches: BatchStore,
    publish: Callable[[Message], object],
    trace: TraceContext | None = None,
) -> Batch:
    """Record the batch and publish its feed message; gives the recorded batch.

    `trace`: the span that submits it.

    `publish` returns once the broker has confirmed the message, as
    `lambda message: publisher.publish(message).result()` does. Starting the same batch twice is harmless: it
    publishes a second message about one batch. Raises BatchConflict if the id belongs to another batch, and
    Outage if a service is unavailable. If the batch was recorded but not published, the next start publishes it.
    """
    kept = batches.create(batch)
    if batches.summary(kept.tenant, kept.batch_id) is None:
        publish(feed_message(kept.tenant, kept.batch_id, chain=secrets.token_hex(6), trace=trace))
    return kept
