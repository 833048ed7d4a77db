"""Starts a nightly run: decides once which objects it takes, then starts its batch."""

from __future__ import annotations

import gzip
import json
import logging
import secrets
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from inferq.broker import Message, assemble_message, feed_message
from inferq.consumers.nightly.listing import Seen, with_news
from inferq.schemas import Batch, InvalidTask
from inferq.schemas.batch_source import defaults_of, input_field, line_of
from inferq.schemas.s3_url import split_s3_prefix
from inferq.schemas.schedule import Schedule, run_id_of
from inferq.schemas.trace_context import TraceContext
from inferq.storage import (
    BatchConflict,
    BatchSource,
    BatchStore,
    ObjectNotFound,
    ObjectStore,
    StoreOutage,
    input_key,
)
from inferq.storage.batches.lines import SourceUnusable, read_lines, unpacked
from inferq.storage.batches.sources import Sources
from inferq.storage.nightly_runs import Run, RunLog, Snapshot

_JSONL = "application/x-ndjson"
_GZIP = "application/gzip"

_log = logging.getLogger(__name__)


class Started(NamedTuple):
    """The recorded run, which may differ from a later start's request, and its batch.

    `batch` is None if another batch has the run's id; `error` says so.
    """

    run: Run
    batch: Batch | None
    error: str | None = None


@dataclass(frozen=True)
class Starter:
    """Starts runs. `publish` returns once the broker has confirmed the message; `trace` is the run's."""

    store: ObjectStore
    batches: BatchStore
    sources: Sources
    publish: Callable[[Message], object]
    trace: TraceContext | None = None

    def start(self, schedule: Schedule, scheduled_at: datetime) -> Started:
        """Start the schedule's run of that time, or complete an earlier start.

        Starting a run twice makes one batch. Raises StoreOutage and BrokerUnavailable; call it again then.
        """
        log = RunLog(self.store, schedule.tenant, schedule.name)
        run_id = run_id_of(schedule.name, scheduled_at)
        self.batches.begin(schedule.tenant)
        place = log.claim(Run(run_id=run_id, scheduled_at=scheduled_at, schedule=schedule))
        run = log.at(place)
        taken = self._settled(log, place)
        about = {} if taken.objects is None else {"new_objects": taken.objects}
        tenant = schedule.tenant
        if taken.objects is not None:
            key = input_key(tenant, run_id, taken.token)
            self.batches.keep_source(tenant, run_id, BatchSource(key=key, lines=taken.objects))
            _log.info(
                "run %s: %s", run_id, f"{taken.objects} new objects" if taken.objects else "nothing new"
            )
        wanted = run.schedule.batch(run.scheduled_at, **about)
        try:
            batch = self.batches.create(wanted)
        except BatchConflict:
            return Started(run, None, taken.error or _id_taken(run_id))
        if self.batches.summary(tenant, run_id) is None:
            if taken.error is None:
                self.publish(feed_message(tenant, run_id, chain=secrets.token_hex(6), trace=self.trace))
            else:
                # Not fed: the next run takes the same objects.
                _log.error("run %s: %s", run_id, taken.error)
                self.publish(assemble_message(tenant, run_id, error=taken.error, trace=self.trace))
        return Started(run, batch)

    def _settled(self, log: RunLog, place: int) -> Snapshot:
        """Which objects the run at `place` takes. Earlier runs are decided first."""
        run = log.at(place)
        behind: list[Run] = []
        before = log.taken(run.run_id)
        while before is None and place > 0:
            behind.append(run)
            place -= 1
            run = log.at(place)
            before = log.taken(run.run_id)
        taken = before or self._take(log, run, None)
        for later in reversed(behind):
            taken = self._take(log, later, taken)
        return taken

    def _take(self, log: RunLog, run: Run, before: Snapshot | None) -> Snapshot:
        schedule = run.schedule
        token = secrets.token_hex(8)
        seen, seen_source = (before.seen, before.seen_source) if before else (None, None)
        unchanged = Snapshot(token=token, seen=seen, seen_source=seen_source)
        base = seen if seen_source == schedule.source else None
        made = unchanged
        try:
            if schedule.only_new:
                objects = self._list(log, run, token, base)
                made = Snapshot(token=token, objects=objects, seen=token, seen_source=schedule.source)
        except (SourceUnusable, InvalidTask) as error:
            # Record the failure: an undecided run would block all later ones.
            made = unchanged.model_copy(update={"error": error.message})
        # The run's own batch does not exist yet, so one with its id belongs to another client, and this run's
        # objects would never be fed. Checked last, since the listing may take long.
        if self.batches.load(schedule.tenant, run.run_id) is not None:
            made = unchanged.model_copy(update={"error": _id_taken(run.run_id)})
        kept = log.settle(run.run_id, made)
        if (
            kept.token != token or kept.error is not None
        ):  # another start was faster, or the run takes nothing
            self.store.delete(input_key(schedule.tenant, run.run_id, token))
            self.store.delete(log.seen_key(token))
        elif kept.seen == token and seen is not None:
            self.store.delete(log.seen_key(seen))  # no longer needed
        return kept

    def _list(self, log: RunLog, run: Run, token: str, base: str | None) -> int:
        """Write the JSONL of new objects and the listing of all objects; return the number of new ones."""
        schedule = run.schedule
        batch = schedule.batch(run.scheduled_at)
        bucket, _ = split_s3_prefix(schedule.source)
        field = input_field(defaults_of(batch))
        listing = (Seen(o.key, o.etag) for o in self.sources.objects(schedule.source))
        count = 0
        with tempfile.TemporaryDirectory(prefix="inferq-nightly-") as folder:
            new, all_ = Path(folder, "new.jsonl"), Path(folder, "all.jsonl.gz")
            with (
                new.open("wb") as tasks,
                gzip.open(all_, "wb", compresslevel=3) as record,
                closing(self._seen(log, base)) as before,
            ):
                for seen, is_new in with_news(listing, before):
                    record.write(
                        json.dumps(seen, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
                    )
                    if is_new:
                        url = f"s3://{bucket}/{seen.key}"
                        tasks.write(line_of(field, url, url, etag=seen.etag))
                        count += 1
            self.store.put(input_key(schedule.tenant, run.run_id, token), new, content_type=_JSONL)
            self.store.put(log.seen_key(token), all_, content_type=_GZIP)
        return count

    def _seen(self, log: RunLog, token: str | None) -> Generator[Seen, None, None]:
        """The listing of an earlier run; empty if there was none."""
        if token is None:
            return
        try:
            pieces = self.store.stream(log.seen_key(token))
        except ObjectNotFound as error:
            # Another start has decided this run and deleted it; a retry finds the decision.
            raise StoreOutage(f"{self.store.location(log.seen_key(token))} was deleted") from error
        with closing(pieces):
            for line in read_lines(unpacked(pieces)):
                if line.content:
                    yield Seen(*json.loads(line.content))


def _id_taken(run_id: str) -> str:
    return (
        f"the run could not start: batch {run_id!r} was submitted by another client; the next run takes its "
        "objects; to start one now: inferq nightly run"
    )
