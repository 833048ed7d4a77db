"""Feeds a batch, slice by slice: publishes its lines as tasks while fewer than `max_in_flight` are in flight.

A slice starts at the cursor in its message and returns the next step: another slice, assembly, or nothing. A
killed slice runs again from the same message and skips the lines marked as fed. A line that was published but not
yet marked is published twice under the same id, which is one task.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from inferq.broker import PublishRejected
from inferq.consumers.batches.chunks import CHUNK, Feeding
from inferq.consumers.batches.lost_lines import LostLines, messages_in, refeed_due
from inferq.consumers.batches.recount import Recount
from inferq.consumers.batches.services import BatchServices
from inferq.schemas import Batch, BatchState, Outage
from inferq.storage import BatchSource, IndexLost, LeaseLost, Stall, Step
from inferq.storage.batches.lines import SourceRefused, SourceUnusable
from inferq.storage.batches.sources import Cursor
from inferq.storage.batches.store import RecordMissing

_LOOK_SECONDS = 0.1
_SELDOM_SECONDS = 0.5
"""Seconds between two looks at a batch, and the longest interval while little changes."""
_IDLE_DELAY = 2
"""Seconds that a stalled batch yields to the slices of other batches."""
_HELD_DELAY = 3
_PAUSE_DELAY = 30
"""The longest time between two looks at a batch outside its window, in seconds; it may be cancelled."""
_RECHECK_SECONDS = 600
"""The longest interval between two recounts of a stalled batch, in seconds. A recount takes a request per task,
and tasks may stay queued for days."""
AGAIN = "again-"
"""Prefix of a chain that replaces an ended one. It waits for a stale lease, since no other chain feeds the
batch."""
_CANCEL_SECONDS = 2.0
"""Seconds that running tasks get to stop before a cancelled batch records all others as cancelled."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GoOn:
    """Run another slice from this cursor, after `seconds`."""

    cursor: Cursor
    seconds: int = 0


@dataclass(frozen=True)
class Assemble:
    """All tasks have ended: assemble the results. `error` says why feeding failed."""

    error: str | None = None


@dataclass(frozen=True)
class Nothing:
    """The batch has ended, or another chain feeds it."""


Next = GoOn | Assemble | Nothing


class _CancelledEarly(Exception):
    """The batch was cancelled before its first line was fed."""


class Slice:
    """One slice of one batch. `run` may raise any Outage, and RecordMissing; run the slice again then.

    While it is `doubtful`, a source that cannot be read now raises SourceRefused; else the batch fails.
    """

    def __init__(
        self,
        services: BatchServices,
        tenant: str,
        batch_id: str,
        *,
        chain: str,
        part: int,
        cursor: Cursor,
        doubtful: bool = False,
    ) -> None:
        self.services = services
        self.name = (tenant, batch_id)
        self._chain = chain
        self._part = part
        self.cursor = cursor
        self._doubtful = doubtful
        self._token = f"{chain}-{part}-{secrets.token_hex(4)}"
        self.step = partial(services.index.step, *self.name, token=self._token)
        self._ends = time.monotonic() + services.settings.batch_slice
        self._state: BatchState | None = None
        self.reached = 0  # the highest line that may have been fed before this slice
        self._stall: Stall | None = None
        self._renewed_at = time.monotonic()
        self._cancel_checked_at = time.monotonic()

    def run(self) -> Next:
        """Feed until the slice ends."""
        services = self.services
        batch = services.batches.load(*self.name)
        if batch is None:
            raise RecordMissing(f"batch {self.name[1]!r}: its record is missing, so it cannot be fed")
        services.batches.enlist(batch)  # an older version may have recorded it and fed the slices before
        if services.batches.summary(*self.name) is not None:
            return Nothing()
        match services.index.take(*self.name, chain=self._chain, part=self._part, token=self._token):
            case "outdated":
                return Nothing()
            case "another" if not self._chain.startswith(AGAIN):
                return Nothing()
            case "another" | "held":
                return GoOn(self.cursor, _HELD_DELAY)
        try:
            return self._prepare_and_feed(batch)
        except LeaseLost:
            return GoOn(self.cursor, _HELD_DELAY)
        except IndexLost:
            _log.warning("batch %s: Redis has lost its state, recounting", batch.batch_id)
            return GoOn(self.cursor)
        finally:
            with suppress(Outage):
                services.index.release(*self.name, self._token)

    def _prepare_and_feed(self, batch: Batch) -> Next:
        services = self.services
        cancelled = services.batches.cancel_requested(*self.name)
        if services.batches.source(*self.name) is None:
            if cancelled:
                return Assemble()
            self._set_state("preparing")
        try:
            source = services.sources.settle(batch, self._go_on_settling)
            self._open(batch, source, cancelled=cancelled)
            return self._feed_slice(batch, source)
        except _CancelledEarly:
            return Assemble()
        except SourceUnusable as error:
            if self._doubtful and isinstance(error, SourceRefused):
                raise
            return Assemble(error.message)

    def _open(self, batch: Batch, source: BatchSource, *, cancelled: bool) -> None:
        """Make the index correct up to the cursor, and advance the cursor if the index is ahead."""
        index = self.services.index
        standing = index.look(*self.name)
        if standing is not None and standing.known:
            if standing.line > self.cursor.line:
                self.cursor = Cursor(standing.line, standing.offset)
            self.reached = standing.high_water
            self._stall = standing.stall
            if cancelled and not standing.cancel_requested:
                index.request_cancel(*self.name)
            return
        index.forget(*self.name, high_water=self.cursor.line, token=self._token)
        line, offset = self.cursor
        if line:
            Recount(self.services, batch, source, self._renew).all(self.cursor)
        index.open(
            *self.name, token=self._token, line=line, offset=offset, total=source.total, cancelled=cancelled
        )

    def _feed_slice(self, batch: Batch, source: BatchSource) -> Next:
        services = self.services
        with (
            services.sources.lines(source, self.cursor) as lines,
            services.sources.taken(source, after=self.cursor.line) as taken,
        ):
            feeding = Feeding(
                services, batch, source, lines, taken,
                cursor=self.cursor, reached=self.reached, step=self.step, ends=self._ends,
            )  # fmt: skip
            try:
                return self._feed_until_the_end(batch, source, feeding)
            finally:
                self.cursor = feeding.cursor

    def _feed_until_the_end(self, batch: Batch, source: BatchSource, feeding: Feeding) -> Next:
        services = self.services
        looked, pause = self.step().ended, _LOOK_SECONDS
        while True:
            step = feeding.settle()
            stall = self._stall_at(step)
            if step.cancel_requested:
                feeding.drain()
                return self._cancelled(batch, source)
            opens_in = batch.window.opens_in(services.clock()) if batch.window else 0.0
            if feeding.done and step.in_flight <= 0:
                return Assemble()
            if services.stopping.is_set() or time.monotonic() > self._ends:
                return self._go_on(feeding)
            if not feeding.done and opens_in <= 0:
                self._set_state("feeding")
                room = batch.max_in_flight - step.in_flight - feeding.unmarked
                # In chunks: a single line would cost a confirm and a mark of its own.
                if room >= _worthwhile(batch) and feeding.feed(min(room, CHUNK)):
                    self._stall = None
                    continue
                if feeding.unmarked:
                    feeding.settle(wait=True)
                    continue
            elif not feeding.done:
                self._set_state("paused")
                if step.in_flight <= 0:
                    return self._go_on(feeding, max(1, min(int(opens_in) + 1, _PAUSE_DELAY)))
            else:
                self._set_state("running")
            if _recheck_due(stall, self._now(), services.settings.batch_doubt):
                self._recheck(Recount(services, batch, source, self._renew), stall)
                return self._go_on(feeding, _IDLE_DELAY)
            few = step.ended - looked < _worthwhile(batch) // 4 and step.in_flight > _worthwhile(batch)
            pause = min(2 * pause, _SELDOM_SECONDS) if few else _LOOK_SECONDS
            looked = step.ended
            services.stopping.wait(pause)

    def _go_on(self, feeding: Feeding, seconds: int = 0) -> GoOn:
        # Otherwise the next slice publishes the unmarked lines again.
        with suppress(PublishRejected):
            feeding.drain()
        if self._stall is not None:
            self.services.index.note_stall(*self.name, self._stall)
        return GoOn(feeding.cursor, seconds)

    def _recheck(self, recount: Recount, stall: Stall) -> None:
        """Look for ends that Redis has missed; if there are none, look for lost lines after some rechecks."""
        recount.in_flight()
        now = self._now()
        if self.step().ended == stall.ended and refeed_due(stall, now):
            count_in = partial(messages_in, self.services.broker)
            lost = LostLines(self.services, now - stall.since, count_in)
            if count := lost.feed_again(recount.unended_tasks()):
                _log.warning(
                    "batch %s: fed %d lines again, which have neither a result nor a message",
                    self.name[1], count,
                )  # fmt: skip
                stall = replace(stall, fed_again=now - stall.since)
        self._stall = replace(stall, asked=now - stall.since)

    def _stall_at(self, step: Step) -> Stall:
        """Since when no task has ended, across slices."""
        now = self._now()
        if self._stall is None or self._stall.ended != step.ended or self._stall.since > now:
            self._stall = Stall(step.ended, now)
        return self._stall

    def _cancelled(self, batch: Batch, source: BatchSource) -> Next:
        """Stop feeding, let running tasks stop, and record the others as cancelled."""
        end = time.monotonic() + _CANCEL_SECONDS
        while (step := self.step()).in_flight > 0 and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)  # a shutdown must not cut this short
        if step.in_flight > 0:
            recount = Recount(self.services, batch, source, self._renew)
            recount.in_flight()
            recount.cancel_in_flight()
        return Assemble()

    def _now(self) -> float:
        """Unix seconds."""
        return self.services.clock().timestamp()

    def _renew(self) -> None:
        with suppress(IndexLost):
            self.step()

    def _go_on_settling(self) -> None:
        """Renew the lease and check for a cancel, if due."""
        now = time.monotonic()
        if now - self._cancel_checked_at >= self.services.pauses.cancel_look:
            self._cancel_checked_at = now
            # From the object store: Redis has no record of the batch before its lines are counted.
            with suppress(Outage):
                if self.services.batches.cancel_requested(*self.name):
                    raise _CancelledEarly
        # While Redis is unavailable, no other slice can take the lease.
        if now - self._renewed_at > self.services.settings.batch_lease / 4:
            self._renewed_at = now
            with suppress(Outage):
                self._renew()

    def _set_state(self, state: BatchState) -> None:
        if state != self._state:
            self.services.index.set_state(*self.name, state)
            self._state = state


def _recheck_due(stall: Stall, now: float, after: float) -> bool:
    """Whether a recount is due: after `after` seconds, then at doubling intervals."""
    still = now - stall.since
    return still > after and still - stall.asked > min(stall.asked, _RECHECK_SECONDS)


def _worthwhile(batch: Batch) -> int:
    return max(1, min(CHUNK, batch.max_in_flight // 10))
