"""The summary of a night: reported at the end of a run, and whenever its window closes before that.

The numbers come from the object store. A night counts the tasks that ended after the previous night; the last one
is the run's total less the previous nights. So the nights of a run add up, except for a task that failed in one
night and was redriven in another. Each night is reported once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from itertools import groupby, islice
from typing import NamedTuple
from zoneinfo import ZoneInfo

from pydantic import ValidationError

from inferq.consumers.batches.assembly import pages_of
from inferq.schemas import Batch, BatchSummary, Callback, EndState, Night, NightEvent, Result, callback_id
from inferq.schemas.encoding import to_json
from inferq.storage import ObjectInfo, ObjectStore, ResultStore, UnreadableResult, folder
from inferq.storage.nightly_runs import Run

_RECORDS = ("failure.json", "result.json")
"""In listing order; the last one counts."""
_AT_A_TIME = 256
_MOST_CODES = 50
_ERROR_CHARACTERS = 1000


class Ended(NamedTuple):
    """How one task ended. `code`: why it failed. `pages`: the pages of its output."""

    status: EndState
    code: str | None = None
    pages: int | None = None


def paused_night(
    run: Run, day: date, began: datetime, until: datetime, total: int | None, ends: Iterable[Ended]
) -> Night:
    """A night that ended with its window; `ends` are its ended tasks."""
    states: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    pages: int | None = None
    for end in ends:
        states[end.status] += 1
        if end.code is not None:
            failures[end.code] += 1
        if end.pages is not None:
            pages = (pages or 0) + end.pages
    return _night(
        run, day, "paused", began, until, total=total, failures=failures, pages=pages,
        succeeded=states["succeeded"], failed=states["failed"], cancelled=states["cancelled"],
    )  # fmt: skip


def last_night(run: Run, day: date, summary: BatchSummary, before: list[Night]) -> Night:
    """The night in which a run ended."""
    counts = summary.counts
    failures = Counter(summary.failures)
    for night in before:
        failures.subtract(night.failures)
    pages = summary.pages
    if pages is not None:
        pages = max(0, pages - sum(night.pages or 0 for night in before))
    state = summary.state
    return _night(
        run, day, state if state in {"cancelled", "failed"} else "completed",
        night_began(run, before[-1].until if before else summary.created_at, summary.finished_at),
        summary.finished_at,
        total=counts.total, failures=failures, pages=pages,
        succeeded=max(0, counts.succeeded - sum(night.succeeded for night in before)),
        failed=max(0, counts.failed - sum(night.failed for night in before)),
        cancelled=max(0, counts.cancelled - sum(night.cancelled for night in before)),
        invalid=counts.invalid, error=summary.error,
    )  # fmt: skip


def failed_night(run: Run, now: datetime, error: str | None) -> Night:
    """The night of a run that could not start. Its name does not depend on `now`."""
    return _night(
        run, day_of(run, run.scheduled_at), "failed", now, now, total=None, failures=Counter(), pages=None,
        succeeded=0, failed=0, cancelled=0, error=error,
    )  # fmt: skip


def _night(
    run: Run, day: date, state: str, began: datetime, until: datetime, *,
    total: int | None, failures: Counter[str], pages: int | None,
    succeeded: int, failed: int, cancelled: int, invalid: int = 0, error: str | None = None,
) -> Night:  # fmt: skip
    seconds = max((until - began).total_seconds(), 0.001)
    return Night.model_validate(
        {
            "run_id": run.run_id,
            "schedule": run.schedule.name,
            "tenant": run.schedule.tenant,
            "night": day.isoformat(),
            "state": state,
            "began": began,
            "until": until,
            "total": total,
            "succeeded": succeeded,
            "failed": failed,
            "cancelled": cancelled,
            "invalid": invalid,
            "failures": {code: number for code, number in failures.most_common(_MOST_CODES) if number > 0},
            "seconds": round(seconds, 3),
            "tasks_per_second": round((succeeded + failed) / seconds, 3),
            "pages": pages,
            "pages_per_second": None if pages is None else round(pages / seconds, 3),
            "error": error and error[:_ERROR_CHARACTERS],
        }
    )


def day_of(run: Run, moment: datetime) -> date:
    """The day that names the night which `moment` lies in or ends.

    Without a window, or before it first opens, that is the day the run is due.
    """
    window = run.schedule.feeding_window
    if window is not None and (opened := window.opened_at(moment)) is not None:
        closes = window.closes_after(opened)
        if closes is not None and closes > run.scheduled_at:
            return window.night_of(moment)
    return run.scheduled_at.astimezone(ZoneInfo(run.schedule.time_zone)).date()


def night_began(run: Run, since: datetime, until: datetime) -> datetime:
    """When the night that ends at `until` began; the hours while the window was closed do not count.

    `since` is the end of the previous night, or the start of the run.
    """
    window = run.schedule.feeding_window
    opened = window.opened_at(until) if window is not None else None
    return since if opened is None else max(since, opened)


def night_callback(night: Night, url: str) -> Callback:
    """The callback that reports a night; the same record gives the same bytes."""
    event = NightEvent(type="nightly.summary", timestamp=night.until, data=night)
    return Callback(
        callback_id=callback_id(night.tenant, "batch", night.run_id, event.type, night.night),
        tenant=night.tenant,
        subject_kind="batch",
        subject_id=night.run_id,
        event=event.type,
        url=url,
        body=to_json(event),
    )


def ended_between(
    store: ObjectStore,
    batch: Batch,
    after: datetime,
    until: datetime,
    *,
    readers: int,
    own_ids: Iterable[str] = (),
) -> Iterator[Ended]:
    """The tasks of a batch that ended after `after` and up to `until`, in constant memory.

    All of them ended after the batch was created, also those that a store stamps a moment earlier: S3 cuts times to
    seconds, and a file system to its own tick.

    `own_ids` are the task ids that the lines name. Every result is read. A redriven task that succeeded ended
    when it succeeded.
    """
    results = ResultStore(store)
    if after <= batch.created_at:
        after = datetime.min.replace(tzinfo=UTC)

    def last_of(records: Iterable[ObjectInfo]) -> str | None:
        """The key of a task's last record, if it was written in that time."""
        last = None
        for info in records:
            if info.key.rpartition("/")[2] in _RECORDS:
                last = info
        return last.key if last is not None and after < last.modified <= until else None

    def end_of(key: str) -> Ended | None:
        return _end(results, store.get(key), batch.batch_id)

    def own_end(task_id: str) -> Ended | None:
        key = last_of(results.records(batch.tenant, task_id))
        return end_of(key) if key is not None else None

    prefix = folder(batch.tenant, f"{batch.batch_id}.").rstrip("/")
    flat = (info for info in store.list(prefix) if info.key.removeprefix(prefix).count("/") == 1)
    tasks = groupby(flat, key=lambda info: info.key.rpartition("/")[0])
    listed = (key for _, records in tasks if (key := last_of(records)) is not None)
    with ThreadPoolExecutor(readers) as threads:
        for look, names in ((end_of, listed), (own_end, iter(own_ids))):
            while some := list(islice(names, _AT_A_TIME)):
                yield from (end for end in threads.map(look, some) if end is not None)


def _end(results: ResultStore, record: bytes, batch_id: str) -> Ended | None:
    """How a task ended; None for a task of another batch."""
    try:
        result = Result.model_validate_json(record)
    except ValidationError:
        return Ended("failed", UnreadableResult.code)
    if result.batch_id != batch_id:
        return None
    # Like a run's summary, which does not count cancelled tasks as failures.
    code = result.error.code if result.error and result.status == "failed" else None
    return Ended(result.status, code, pages_of(results, result))
