"""The Celery jobs of nightly runs: starting a run, and reporting its nights."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from celery import Celery, Task
from pydantic import JsonValue
from structlog.contextvars import bound_contextvars

from inferq.broker import NIGHT_START_JOB, NIGHT_WATCH_JOB, callback_message, delayed, job_message
from inferq.broker.spans import job_trace, processing_job
from inferq.consumers.batches.retry import resend_unless_done
from inferq.consumers.batches.services import BatchServices, load_services
from inferq.consumers.nightly.night import (
    Ended,
    day_of,
    ended_between,
    failed_night,
    last_night,
    night_began,
    night_callback,
    paused_night,
)
from inferq.consumers.nightly.start import Starter
from inferq.schemas import Night
from inferq.schemas.schedule import Schedule, run_id_of
from inferq.schemas.trace_context import TraceContext
from inferq.storage.batches.lines import SourceUnusable
from inferq.storage.batches.store import RecordMissing
from inferq.storage.nightly_runs import Run, RunLog

_WATCH_SECONDS = 15
"""The longest time from the end of a run to its summary, in seconds."""
_SETTLING_SECONDS = 2.0
"""Seconds after a night until a listing has everything stored in it."""

_log = logging.getLogger(__name__)


def add_jobs(
    app: Celery, services: BatchServices | None = None, *, watch_seconds: int = _WATCH_SECONDS
) -> None:
    """Add the jobs of nightly runs to an application. `services` defaults to those of the environment.

    Raises InstallationError for bad settings.
    """
    here = services or load_services()

    def watch_on(
        run: Run, since: datetime, seconds: int, trace: TraceContext | None, **more: JsonValue
    ) -> None:
        job_id = f"watch-{run.run_id}-{secrets.token_hex(6)}"
        arguments: dict[str, JsonValue] = {
            "run": run.model_dump(mode="json"), "since": since.isoformat(), **more,
        }  # fmt: skip
        message = job_message(NIGHT_WATCH_JOB, "inference.batches", arguments, job_id=job_id, trace=trace)
        here.confirm(delayed(message, seconds))

    @app.task(name=NIGHT_START_JOB, bind=True, shared=False)  # type: ignore[untyped-decorator]
    def start(self: Task, schedule: dict[str, Any], scheduled_at: str, **more: JsonValue) -> None:
        wanted, moment = Schedule.model_validate(schedule), datetime.fromisoformat(scheduled_at)
        run_id, carried = run_id_of(wanted.name, moment), job_trace(more.get("trace"))

        def once() -> None:
            about = {"inferq.batch.id": run_id, "inferq.schedule": wanted.name}
            with processing_job("inference.batches", NIGHT_START_JOB, carried, about) as span:
                trace = span.context or carried
                starter = Starter(here.store, here.batches, here.sources, here.confirm, trace)
                run, batch, error = starter.start(wanted, moment)
                watcher = Watcher(here, run, trace)
                if batch is None:
                    watcher.fail(error, here.clock())
                elif not watcher.over:
                    watch_on(run, batch.created_at, min(1, watch_seconds), trace)

        with bound_contextvars(tenant=wanted.tenant, batch_id=run_id, trace_id=carried and carried.trace_id):
            resend_unless_done(self, here, f"run {run_id}", once)

    @app.task(name=NIGHT_WATCH_JOB, bind=True, shared=False)  # type: ignore[untyped-decorator]
    def watch(self: Task, run: dict[str, Any], since: str, **more: JsonValue) -> None:
        known, began = Run.model_validate(run), datetime.fromisoformat(since)
        # The looks have no spans: a run of hours would have thousands of them.
        trace = job_trace(more.pop("trace", None))

        def once() -> None:
            goes_on = Watcher(here, known, trace).look(began, here.clock())
            if goes_on is not None:
                watch_on(known, goes_on, watch_seconds, trace, **more)

        with bound_contextvars(
            tenant=known.schedule.tenant, batch_id=known.run_id, trace_id=trace and trace.trace_id
        ):
            resend_unless_done(self, here, f"run {known.run_id}", once)


class Watcher:
    """Reports the nights of a run. May raise any Outage; call it again then."""

    def __init__(self, services: BatchServices, run: Run, trace: TraceContext | None = None) -> None:
        self._services = services
        self._run = run
        self._trace = trace
        self._log = RunLog(services.store, run.schedule.tenant, run.schedule.name)

    @property
    def over(self) -> bool:
        """Whether the run's last night is recorded, and so reported."""
        return any(night.state != "paused" for night in self._nights())

    def look(self, since: datetime, now: datetime) -> datetime | None:
        """Report the nights that ended between `since` and `now`.

        Returns the next `since`, or None once the run has ended and all its nights are reported.
        """
        services, run = self._services, self._run
        tenant = run.schedule.tenant
        since = min(since, now)  # or nights would go unreported after a clock that was ahead
        summary = services.batches.summary(tenant, run.run_id)
        if summary is not None:
            before = [night for night in self._nights() if night.state == "paused"]
            day = day_of(run, summary.finished_at)
            if before and before[-1].night == day.isoformat():
                # Tasks in flight when the window closed ended during the day: reported under a name of their own.
                self._set_state(last_night(run, day, summary, before), f"{day.isoformat()}-end")
            else:
                self._set_state(last_night(run, day, summary, before), day.isoformat())
            return None
        window = run.schedule.feeding_window
        closes = None if window is None else window.closes_after(since)
        if closes is None or (now - closes).total_seconds() < _SETTLING_SECONDS:
            return since
        self._pause(since, closes)
        return closes

    def fail(self, error: str | None, now: datetime) -> None:
        """Report a run that failed before it had a batch."""
        if not self.over:
            _log.error("run %s: %s", self._run.run_id, error)
        night = failed_night(self._run, now, error)
        self._set_state(night, night.night)

    def _pause(self, since: datetime, closes: datetime) -> None:
        services, run = self._services, self._run
        tenant = run.schedule.tenant
        batch = services.batches.load(tenant, run.run_id)
        if batch is None:
            raise RecordMissing(f"run {run.run_id!r}: the record of its batch is missing")
        source = services.batches.source(tenant, run.run_id)

        def ended(after: datetime = batch.created_at) -> Iterator[Ended]:
            return ended_between(
                services.store, batch, after, closes,
                readers=services.settings.batch_readers,
                own_ids=services.sources.own_ids(source) if source is not None else (),
            )  # fmt: skip

        total = None if source is None else source.total
        began = night_began(run, since, closes)
        try:
            night = paused_night(run, day_of(run, closes), began, closes, total, ended(since))
            # Report a night without ended tasks, too: all workers may be down. The exception is a window that
            # closed when the run was due, which a clock behind beat's may show.
            to_tell = night.ended > 0 or (closes > run.scheduled_at and self._has_left(total, ended))
        except SourceUnusable as error:
            _log.warning("run %s: a night cannot be reported: %s", run.run_id, error)
            return
        if to_tell:
            self._set_state(night, night.night)

    def _has_left(self, total: int | None, ended: Callable[[], Iterable[Ended]]) -> bool:
        """Whether the run may have unfinished tasks; `ended` reads the results of the others."""
        if total is None or sum(night.ended for night in self._nights()) < total:
            return True
        # The nights count twice what was redriven.
        return sum(1 for _ in ended()) < total

    def _set_state(self, night: Night, name: str) -> None:
        changes = {"night": name, "trace_id": self._trace.trace_id if self._trace is not None else None}
        kept = self._log.keep_night(self._run.run_id, name, night.model_copy(update=changes))
        url = self._run.schedule.callback
        if url is not None:
            self._services.confirm(callback_message(night_callback(kept, url), trace=self._trace))
        _log.info("run %s: night %s: %s, %d ended", kept.run_id, kept.night, kept.state, kept.ended)

    def _nights(self) -> list[Night]:
        return self._log.nights(self._run.run_id, Night)
