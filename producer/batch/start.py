"""Starting a batch: put on record once, and its feeding handed to the broker."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from inferq.broker import Message, feed_message
from inferq.schemas import Batch
from inferq.storage import BatchStore


def start(batch: Batch, batches: BatchStore, publish: Callable[[Message], object]) -> Batch:
    """Put the batch on record and have it fed; gives the batch on record.

    `publish` returns once the broker has confirmed the message, as
    `lambda message: publisher.publish(message).result()` does. A second start of the same batch is harmless:
    it is a second message about one batch. Raises BatchConflict where the id belongs to another, and
    Outage; what was recorded and not handed over is handed over by the next start.
    """
    kept = batches.create(batch)
    if batches.summary(kept.tenant, kept.batch_id) is None:
        publish(feed_message(kept.tenant, kept.batch_id, chain=secrets.token_hex(6)))
    return kept
