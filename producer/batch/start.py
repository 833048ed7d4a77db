"""Starting a batch: put on record once, and its feeding handed to the broker."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pydantic import JsonValue

from inferq.broker import ASSEMBLE_JOB, FEED_JOB, Message, job_message
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


def feed_message(
    tenant: str, batch_id: str, *, chain: str, part: int = 0, line: int = 0, offset: int = 0
) -> Message:
    """The job that feeds a batch from behind `line`, which ends at `offset` bytes of the source.

    `chain` names the feeding from its start to its end, `part` counts its slices.
    """
    arguments: dict[str, JsonValue] = {
        "tenant": tenant, "batch_id": batch_id, "chain": chain, "part": part, "line": line, "offset": offset,
    }  # fmt: skip
    return job_message(FEED_JOB, "inference.batches", arguments, job_id=f"feed-{chain}-{part}")


def assemble_message(tenant: str, batch_id: str, *, error: str | None = None) -> Message:
    """The job that puts the results of a batch together, once its lines have ended.

    `error` says why it could not be fed at all.
    """
    arguments: dict[str, JsonValue] = {"tenant": tenant, "batch_id": batch_id, "error": error}
    job_id = f"assemble-{secrets.token_hex(6)}"
    return job_message(ASSEMBLE_JOB, "inference.batches", arguments, job_id=job_id)
