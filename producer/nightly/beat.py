"""Starts runs when they are due: Celery beat's loop over the schedules of a file.

It keeps no state on its own disk: the object store records the runs. A run's id is its schedule's name and its
time, and starting a run twice is harmless. So beat may be killed at any time, and two beats may run at once.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery
from celery.beat import Scheduler, Service
from pydantic import JsonValue

from inferq.broker import NIGHT_START_JOB, Message, job_message
from inferq.broker.spans import sending_job
from inferq.producer.nightly.metrics import BeatMetrics
from inferq.producer.nightly.schedules import SchedulesUnusable, read_schedules
from inferq.schemas import InferqError
from inferq.schemas.probe_server import Readiness
from inferq.schemas.schedule import Schedule, run_id_of
from inferq.schemas.trace_context import TraceContext
from inferq.storage import ObjectStore
from inferq.storage.nightly_runs import RunLog, known_schedules

LOOK_SECONDS = 2.0
"""Seconds between two looks at the file, at most; also the age at which a change of it is accepted."""
_RETRY_SECONDS = 5.0
_SMALL_STEP = timedelta(minutes=1)
"""By how much clocks differ without a warning."""

_log = logging.getLogger(__name__)


def send_start(schedule: Schedule, scheduled_at: datetime, publish: Callable[[Message], object]) -> None:
    """Publish the job that starts a run, in a span that begins the run's trace."""
    with sending_job("inference.batches", run_id_of(schedule.name, scheduled_at)) as span:
        publish(start_message(schedule, scheduled_at, span.context))


def start_message(schedule: Schedule, scheduled_at: datetime, trace: TraceContext | None = None) -> Message:
    """The job that starts a run. It carries the whole schedule, so that its worker needs no file."""
    run_id = run_id_of(schedule.name, scheduled_at)
    arguments: dict[str, JsonValue] = {
        "schedule": schedule.model_dump(mode="json"),
        "scheduled_at": scheduled_at.astimezone(UTC).isoformat(),
    }
    return job_message(NIGHT_START_JOB, "inference.batches", arguments, job_id=run_id, trace=trace)


class Beat:
    """Starts the due runs at each `tick`. `publish` returns once the broker has confirmed.

    Of the runs that a schedule missed, it starts only the latest, and none from before it knew the schedule.
    """

    def __init__(
        self,
        path: Path,
        store: ObjectStore,
        publish: Callable[[Message], object],
        schedules: dict[str, Schedule],
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self.metrics = BeatMetrics()
        self._path = path
        self._store = store
        self._publish = publish
        self._schedules = schedules
        self._look_seconds = look_seconds
        self._stamp: object = None
        self._seen: tuple[object, datetime] | None = None
        self._bad = False
        self._tidy = True
        self._processed: dict[str, tuple[Schedule, datetime, datetime | None]] = {}
        self.state = Readiness(False, ("the first tick",))

    def tick(self, now: datetime) -> float:
        """Start the runs that are due at `now` (aware); gives the seconds until the next tick."""
        waiting = [] if self._read(now) else [f"a valid {self._path.name}"]
        wait = self._look_seconds
        try:
            self._forget_others()
        except InferqError as error:
            _log.warning("removed schedules cannot be forgotten yet; still retrying: %s", error)
            waiting.append(error.code)
        for schedule in self._schedules.values():
            try:
                self._look_at(schedule, now)
            except InferqError as error:
                _log.warning("%s: the run cannot be started; still retrying: %s", schedule.name, error)
                waiting.append(error.code)
                continue
            coming = next(schedule.times.after(now), None)
            if coming is not None:
                wait = min(wait, (coming - now).total_seconds())
        self.state = Readiness(not waiting, tuple(dict.fromkeys(waiting)))
        return _RETRY_SECONDS if waiting else max(wait, 0.0)

    def _look_at(self, schedule: Schedule, now: datetime) -> None:
        log = RunLog(self._store, schedule.tenant, schedule.name)
        before = self._processed.get(schedule.name)
        started = None
        if before is not None and before[0].times == schedule.times and before[0].tenant == schedule.tenant:
            _, after, started = before
        else:
            after = log.known(now, schedule).since
        if after > now:
            _warn_set_back(schedule, after, now)
            if log.known(now, schedule).since > now:
                log.know(now, schedule)
        due = schedule.times.latest(after, now)
        if due is not None and due != started:
            self._start(log, schedule, due)
            started = due
        # Not the later of the two: after a clock that was ahead, no run would be due for as long.
        self._processed[schedule.name] = (schedule, now, started)

    def _start(self, log: RunLog, schedule: Schedule, due: datetime) -> None:
        try:
            known = log.has(run_id_of(schedule.name, due))
            if not known:
                send_start(schedule, due, self._publish)
                _log.info("%s: started the run of %s", schedule.name, due.isoformat())
        except InferqError:
            self.metrics.due(schedule.name, due, "failed")
            raise
        self.metrics.due(schedule.name, due, "known" if known else "started")

    def _read(self, now: datetime) -> bool:
        """Read the file if it has changed; gives whether it is valid. An invalid file changes nothing.

        A change counts once two looks read the same: a file that is still being written may end between two
        tables, and look valid.
        """
        try:
            found = self._path.stat()
            stamp: object = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError as error:
            stamp = error.errno
        if stamp == self._stamp:
            self._seen = None
            return not self._bad
        try:
            read: dict[str, Schedule] | str = read_schedules(self._path)
        except SchedulesUnusable as error:
            read = error.message
        if self._seen is None or self._seen[0] != read:
            self._seen = (read, now)
        if abs((now - self._seen[1]).total_seconds()) >= self._look_seconds:
            self._take_over(read)
            self._stamp, self._seen = stamp, None
        return not self._bad

    def _take_over(self, read: dict[str, Schedule] | str) -> None:
        self._bad = isinstance(read, str)
        if isinstance(read, str):
            _log.error("keeping the earlier schedules: %s", read)
            return
        if self._stamp is not None:
            _log.info("read %s again: %s", self._path, ", ".join(read) or "no schedules")
        for name in self._schedules.keys() - read.keys():
            self._processed.pop(name, None)
            self.metrics.forget(name)
        self._schedules = read
        self._tidy = False

    def _forget_others(self) -> None:
        """Forget the removed schedules, also those that an earlier beat knew.

        So a schedule that is added again has missed no run meanwhile.
        """
        if self._tidy:
            return
        kept = {(schedule.tenant, name) for name, schedule in self._schedules.items()}
        for tenant, name in known_schedules(self._store):
            if (tenant, name) not in kept:
                RunLog(self._store, tenant, name).forget()
                _log.info("%s of tenant %s: forgotten, because the file no longer has it", name, tenant)
        self._tidy = True


def _warn_set_back(schedule: Schedule, after: datetime, now: datetime) -> None:
    if after - now > _SMALL_STEP:
        _log.warning(
            "%s: the clock was set back from %s; runs are due from now on. A run that was started for a time "
            "ahead is not started again: inferq nightly run %s starts another",
            schedule.name, after.isoformat(timespec="seconds"), schedule.name,
        )  # fmt: skip


class _BeatScheduler(Scheduler):  # type: ignore[misc]  # Celery has no types
    """Ticks our Beat; Celery's configuration has no schedules."""

    def __init__(self, beat: Beat, *args: Any, **kwargs: Any) -> None:
        self._beat = beat
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        return

    def tick(self, *_args: Any, **_kwargs: Any) -> float:
        return self._beat.tick(datetime.now(UTC))


def keep_beating(app: Celery, beat: Beat) -> None:
    """Run Celery beat, until SIGTERM."""

    def stop(_number: int, _frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    Service(app, scheduler_cls=partial(_BeatScheduler, beat)).start()
