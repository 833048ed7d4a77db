"""Submitting a batch: check its upload, record it, and publish the message that starts its feeding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from inferq.broker.messages import Message
from inferq.broker.spans import sending_job
from inferq.producer.batch.start import start
from inferq.producer.gateway.problems import ProblemError, problem_of, unknown_file
from inferq.producer.gateway.services import Services
from inferq.schemas import Batch, InferqError
from inferq.schemas.trace_context import TraceContext
from inferq.storage.batches.store import BatchConflict
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import ObjectNotFound


async def submit_batch(services: Services, batch: Batch, trace: TraceContext | None = None) -> Batch:
    """The batch on record, once the broker has confirmed the message. `trace`: that of the request's client.

    Raises ProblemError: 409 if the id belongs to another batch, 422 if its source is an upload that does
    not exist or is empty, 503 if the broker did not confirm or the object store is unavailable.
    """
    await _check_upload(services, batch)
    publish = _publisher(services, asyncio.get_running_loop())
    try:
        with sending_job("inference.batches", batch.batch_id) as span:
            recorded = await services.on_store(start, batch, services.batches, publish, span.context or trace)
    except BatchConflict as error:
        raise ProblemError(409, "id_conflict", error.message) from error
    except InferqError as error:
        problem = problem_of(error)
        # The client needs the id to submit the same batch again, which may have been accepted.
        problem.extensions["batch_id"] = batch.batch_id
        raise problem from error
    services.batch_cache.keep(recorded)
    return recorded


async def _check_upload(services: Services, batch: Batch) -> None:
    scheme, _, file_id = batch.source.partition(":")
    if scheme != "inferq":
        return
    try:
        info = await services.on_store(services.store.stat, upload_key(batch.tenant, file_id))
    except ObjectNotFound as error:
        raise unknown_file("source", batch.source) from error
    if info.bytes == 0:
        raise ProblemError(
            422, "empty_batch", f"source: the uploaded file {batch.source!r} is empty; upload a JSONL"
        )


def _publisher(services: Services, loop: asyncio.AbstractEventLoop) -> Callable[[Message], None]:
    """A function that publishes from a store thread, and returns once the broker has confirmed."""

    def publish(message: Message) -> None:
        confirmed = services.publisher.confirm(message, timeout=services.settings.submit_timeout)
        asyncio.run_coroutine_threadsafe(confirmed, loop).result()

    return publish
