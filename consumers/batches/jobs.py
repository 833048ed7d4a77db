"""The jobs of batches, on Celery: feeding, slice by slice, and putting the results together."""

from __future__ import annotations

import logging

from celery import Celery, Task
from pydantic import NonNegativeInt

from inferq.broker import ASSEMBLE_JOB, FEED_JOB, assemble_message, feed_message
from inferq.consumers.batches.assembly import Unfinished, end
from inferq.consumers.batches.feeder import AGAIN, Assemble, GoOn, Nothing, Slice
from inferq.consumers.batches.retry import load_services, resend_unless_done
from inferq.consumers.batches.services import BatchServices
from inferq.schemas import BatchId
from inferq.schemas.task import Tenant
from inferq.storage.batches.sources import Cursor

_log = logging.getLogger(__name__)


def add_jobs(app: Celery, services: BatchServices | None = None) -> None:
    """Add the jobs of batches to an application; `around` defaults to what the environment says.

    Raises InstallationError for bad settings.
    """
    here = services or load_services()

    @app.task(name=FEED_JOB, bind=True, shared=False)  # type: ignore[untyped-decorator]
    def feed(
        self: Task,
        tenant: Tenant,
        batch_id: BatchId,
        chain: str,
        part: NonNegativeInt,
        line: NonNegativeInt,
        offset: NonNegativeInt,
    ) -> None:
        def once() -> None:
            cursor = Cursor(line, offset)
            match Slice(here, tenant, batch_id, chain=chain, part=part, cursor=cursor).run():
                case GoOn(cursor, seconds):
                    if seconds:
                        arguments = {
                            "tenant": tenant, "batch_id": batch_id, "chain": chain, "part": part + 1,
                            "line": cursor.line, "offset": cursor.offset,
                        }  # fmt: skip
                        self.apply_async(kwargs=arguments, countdown=seconds, queue="inference.batches")
                    else:
                        here.confirm(
                            feed_message(
                                tenant, batch_id, chain=chain, part=part + 1,
                                line=cursor.line, offset=cursor.offset,
                            )
                        )  # fmt: skip
                case Assemble(error):
                    here.confirm(assemble_message(tenant, batch_id, error=error))
                case Nothing():
                    pass

        resend_unless_done(self, here, f"batch {batch_id}", once)

    @app.task(name=ASSEMBLE_JOB, bind=True, shared=False)  # type: ignore[untyped-decorator]
    def assemble(self: Task, tenant: Tenant, batch_id: BatchId, error: str | None = None) -> None:
        def once() -> None:
            batch = here.batches.load(tenant, batch_id)
            if batch is None:
                _log.error("batch %s: there is no record of it, so that it cannot be ended", batch_id)
                return
            try:
                end(here, batch, error)
            except Unfinished:
                # Redis said that all had ended, the object store does not: it is the one to be believed.
                _log.warning("batch %s: not all of it has ended: it is looked at again", batch_id)
                standing = here.index.look(tenant, batch_id)
                line, offset = (standing.line, standing.offset) if standing else (0, 0)
                here.index.forget(tenant, batch_id, high_water=line)
                chain = f"{AGAIN}{self.request.id}"
                here.confirm(feed_message(tenant, batch_id, chain=chain, line=line, offset=offset))

        resend_unless_done(self, here, f"batch {batch_id}", once)
