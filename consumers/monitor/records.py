"""Batches and nightly runs by state, from their records in the object store.

Each reading does a bounded amount of work, and writes nothing. What has ended is looked up once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice

from inferq.schemas import BATCH_END_STATES, BatchState, InferqError, Outage, Window
from inferq.schemas.batch_source import defaults_of
from inferq.schemas.cron import Cron
from inferq.schemas.monitor import ANY_TYPE, LateNight
from inferq.schemas.schedule import run_id_of
from inferq.storage import BatchIndex, BatchStore, ObjectStore, StatusOutage
from inferq.storage.batches.times import BatchTimes
from inferq.storage.nightly_runs import Run, RunLog, known_schedules

MOST_LOOKS = 300
"""The most batches that one reading looks at."""
_MOST_TENANTS = 1000
_MOST_SCHEDULES = 300
_NEWEST = 200
"""The newest batches of a tenant that are listed at each reading."""
_OPEN_AT_MOST = timedelta(days=30)
"""An older batch without an end is deleted, or forgotten."""
_ENDED_WITHIN = timedelta(days=1)

Name = tuple[str, str]
"""A tenant, and a batch of it."""


@dataclass(frozen=True)
class RecordFigures:
    """Batches and nights by state; None while Redis is unavailable, or not every batch was looked at yet."""

    batches: Counter[BatchState] | None
    nights: Counter[BatchState] | None
    late_nights: tuple[LateNight, ...]
    redis: bool
    unfed: Mapping[str, int] | None = None
    """Lines that batches have yet to feed, by task type; None while a batch's number is unknown."""


@dataclass
class _Batch:
    """A batch that is listed. `looked` is None before the first look; `ended` is its end, with the time."""

    created_at: datetime
    window: Window | None = None
    task_type: str = ANY_TYPE
    looked: datetime | None = None
    ended: tuple[BatchState, datetime] | None = None
    gone: bool = False


@dataclass
class RecordReader:
    """Reads the figures. For one thread."""

    store: ObjectStore
    index: BatchIndex
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    _known: dict[Name, _Batch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batches = BatchStore(self.store)
        self._times = BatchTimes(self.store)

    def read(self) -> RecordFigures:
        """The figures now. Raises StoreOutage."""
        now = self.clock()
        self._list(now)
        self._look(now)
        late, runs = self._nights(now)
        open_ = [
            name for name, batch in self._known.items() if batch.looked and not batch.ended and not batch.gone
        ]
        unfinished = [run for run in runs if not isinstance(run, str)]
        try:
            told = self.index.states([*open_, *(name for name, _ in unfinished)])
        except StatusOutage:
            return RecordFigures(None, None, late, redis=False)
        states = iter(told)
        now_in = {name: _unfinished(next(states), self._known[name].window, now) for name in open_}
        batches: Counter[BatchState] = Counter(now_in.values())
        nights: Counter[BatchState] = Counter(
            _unfinished(next(states), window, now) for _, window in unfinished
        )
        nights.update(run for run in runs if isinstance(run, str))
        for batch in self._known.values():
            if batch.ended is not None and now - batch.ended[1] <= _ENDED_WITHIN:
                batches[batch.ended[0]] += 1
        complete = all(batch.looked for batch in self._known.values())
        if not complete:
            return RecordFigures(None, nights, late, redis=True)
        unfed = self._unfed([name for name, state in now_in.items() if state == "feeding"])
        return RecordFigures(batches, nights, late, redis=True, unfed=unfed)

    def _unfed(self, feeding: Sequence[Name]) -> Mapping[str, int] | None:
        lines = Counter[str]()
        try:
            for name, count in zip(feeding, self.index.unfed(feeding), strict=True):
                if count is None:
                    return None
                lines[self._known[name].task_type] += count
        except StatusOutage:
            return None
        return lines

    def _list(self, now: datetime) -> None:
        """Note the newest batches of each tenant. Forget those that ended and are listed no more."""
        listed: dict[Name, _Batch] = {}
        for tenant in islice(self._times.tenants(), _MOST_TENANTS):
            for entry in self._times.listed(tenant, limit=_NEWEST):
                created = datetime.fromtimestamp(entry.at / 1e6, UTC)
                if now - created > _OPEN_AT_MOST:
                    break
                name = tenant, entry.batch_id
                listed[name] = self._known.get(name) or _Batch(created)
        for name, batch in self._known.items():
            if batch.ended is None and not batch.gone and now - batch.created_at <= _OPEN_AT_MOST:
                listed.setdefault(name, batch)
        self._known = listed

    def _look(self, now: datetime) -> None:
        """Look at batches that have not ended, those first that were looked at longest ago."""
        waiting = [item for item in self._known.items() if item[1].ended is None and not item[1].gone]
        never = datetime.min.replace(tzinfo=UTC)
        for (tenant, batch_id), batch in sorted(waiting, key=lambda item: item[1].looked or never)[
            :MOST_LOOKS
        ]:
            try:
                if batch.looked is None:
                    record = self._batches.load(tenant, batch_id)
                    batch.gone = record is None
                    if record is not None:
                        batch.window = record.window
                        batch.task_type = str(defaults_of(record).get("task_type", ANY_TYPE))
                summary = self._batches.summary(tenant, batch_id)
            except Outage:
                raise
            except InferqError:  # a record of another version
                batch.gone = True
            else:
                if summary is not None:
                    batch.ended = summary.state, summary.finished_at
            batch.looked = now

    def _nights(
        self, now: datetime
    ) -> tuple[tuple[LateNight, ...], list[BatchState | tuple[Name, Window | None]]]:
        """How late each schedule is, and of its last run the end state, or its batch if it has not ended."""
        late, runs = [], []
        for tenant, name in islice(known_schedules(self.store), _MOST_SCHEDULES):
            log = RunLog(self.store, tenant, name)
            try:
                run = log.last()
                ended = None if run is None else self._end_of(log, run)
                seconds = max(
                    _not_started(log, name, now), _beyond_window(run, now) if ended is None else 0.0
                )
            except Outage:
                raise
            except (InferqError, ValueError):  # a record of another version
                continue
            late.append(LateNight(schedule=name, tenant=tenant, seconds=round(seconds, 1)))
            if run is not None:
                unfinished = (tenant, run.run_id), run.schedule.feeding_window
                runs.append(unfinished if ended is None else ended)
        return tuple(late), runs

    def _end_of(self, log: RunLog, run: Run) -> BatchState | None:
        summary = self._batches.summary(run.schedule.tenant, run.run_id)
        if summary is not None:
            return summary.state
        taken = log.taken(run.run_id)
        return "failed" if taken is not None and taken.error is not None else None


def _not_started(log: RunLog, name: str, now: datetime) -> float:
    """Seconds since the schedule's last time, if its run has not started."""
    known = log.since()
    if known is None:
        return 0.0
    due = Cron(known.cron, known.time_zone).latest(known.since, now)
    return 0.0 if due is None or log.has(run_id_of(name, due)) else (now - due).total_seconds()


def _beyond_window(run: Run | None, now: datetime) -> float:
    """Seconds since the window of a run that has not ended first closed."""
    window = None if run is None else run.schedule.feeding_window
    closes = None if run is None or window is None else window.closes_after(run.scheduled_at)
    return 0.0 if closes is None else max(0.0, (now - closes).total_seconds())


def _unfinished(state: BatchState | None, window: Window | None, now: datetime) -> BatchState:
    """The state of a batch without a summary, as the gateway answers it."""
    if state in BATCH_END_STATES:
        return "finishing"
    if state is not None:
        return state
    return "paused" if window is not None and not window.is_open(now) else "feeding"
