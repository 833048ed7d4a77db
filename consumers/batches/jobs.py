"""The Celery jobs of batches: feeding, slice by slice, and assembling the results."""

from __future__ import annotations

import logging

from celery import Celery, Task
from pydantic import JsonValue, NonNegativeInt
from structlog.contextvars import bound_contextvars

from inferq.broker import ASSEMBLE_JOB, FEED_JOB, assemble_message, delayed, feed_message
from inferq.broker.spans import job_trace, processing_job
from inferq.consumers.batches.assembly import Unfinished, end
from inferq.consumers.batches.feeder import AGAIN, Assemble, GoOn, Nothing, Slice
from inferq.consumers.batches.retry import SOURCE_DOUBTS, resend_unless_done
from inferq.consumers.batches.services import BatchServices, load_services
from inferq.schemas import BatchId
from inferq.schemas.task import Tenant
from inferq.schemas.trace_context import TraceContext
from inferq.schemas.tracing import Span
from inferq.storage.batches.sources import Cursor
from inferq.storage.batches.store import RecordMissing

_log = logging.getLogger(__name__)


def add_jobs(app: Celery, services: BatchServices | None = None) -> None:
    """Add the jobs of batches to an application. `services` defaults to those of the environment.

    Raises InstallationError for bad settings.
    """
    here = services or load_services()

    # `trace`, and arguments that a newer version adds, are passed on to the next slice.
    @app.task(name=FEED_JOB, bind=True, shared=False)  # type: ignore[untyped-decorator]
    def feed(
        self: Task,
        tenant: Tenant,
        batch_id: BatchId,
        chain: str,
        part: NonNegativeInt,
        line: NonNegativeInt,
        offset: NonNegativeInt,
        **more: JsonValue,
    ) -> None:
        trace = job_trace(more.get("trace"))

        def once() -> None:
            cursor = Cursor(line, offset)
            doubtful = self.request.retries < SOURCE_DOUBTS
            fed = Slice(here, tenant, batch_id, chain=chain, part=part, cursor=cursor, doubtful=doubtful)
            with _processing(FEED_JOB, trace, batch_id) as span:
                following = fed.run()
            goes_on = trace or span.context
            match following:
                case GoOn(cursor, seconds):
                    message = feed_message(
                        tenant, batch_id, chain=chain, part=part + 1,
                        line=cursor.line, offset=cursor.offset, more=more, trace=goes_on,
                    )  # fmt: skip
                    here.confirm(delayed(message, seconds) if seconds else message)
                case Assemble(error):
                    here.confirm(assemble_message(tenant, batch_id, error=error, trace=goes_on))
                case Nothing():
                    pass

        with bound_contextvars(tenant=tenant, batch_id=batch_id, trace_id=trace and trace.trace_id):
            resend_unless_done(self, here, f"batch {batch_id}", once)

    @app.task(name=ASSEMBLE_JOB, bind=True, shared=False)  # type: ignore[untyped-decorator]
    def assemble(
        self: Task, tenant: Tenant, batch_id: BatchId, error: str | None = None, **more: JsonValue
    ) -> None:
        trace = job_trace(more.get("trace"))

        def once() -> None:
            batch = here.batches.load(tenant, batch_id)
            if batch is None:
                raise RecordMissing(f"batch {batch_id!r}: its record is missing, so it cannot be finished")
            try:
                with _processing(ASSEMBLE_JOB, trace, batch_id) as span:
                    doubtful = self.request.retries < SOURCE_DOUBTS
                    end(here, batch, error, doubtful=doubtful, trace=span.context or trace)
            except Unfinished:
                # Redis counted more ends than the object store has. The object store is right.
                _log.warning("batch %s: some tasks have not ended, recounting", batch_id)
                standing = here.index.look(tenant, batch_id)
                line, offset = (standing.line, standing.offset) if standing else (0, 0)
                here.index.forget(tenant, batch_id, high_water=line)
                chain = f"{AGAIN}{self.request.id}"
                here.confirm(
                    feed_message(tenant, batch_id, chain=chain, line=line, offset=offset, trace=trace)
                )

        with bound_contextvars(tenant=tenant, batch_id=batch_id, trace_id=trace and trace.trace_id):
            resend_unless_done(self, here, f"batch {batch_id}", once)


def _processing(job: str, trace: TraceContext | None, batch_id: str) -> Span:
    return processing_job("inference.batches", job, trace, {"inferq.batch.id": batch_id})
