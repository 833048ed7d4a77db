"""Starting a run: what it takes is settled, once, and its batch is started."""

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
from inferq.storage.runs import Run, RunLog, Snapshot

_JSONL = "application/x-ndjson"
_GZIP = "application/gzip"

_log = logging.getLogger(__name__)


class Started(NamedTuple):
    """A run as it is on record, which a later start may not have asked for, and its batch.

    Where its id belongs to a batch of somebody else it has none: only `error` tells of that.
    """

    run: Run
    batch: Batch | None
    error: str | None = None


@dataclass(frozen=True)
class Starter:
    """Starts runs. `publish` returns once the broker has confirmed the message."""

    store: ObjectStore
    batches: BatchStore
    sources: Sources
    publish: Callable[[Message], object]

    def start(self, schedule: Schedule, scheduled_at: datetime) -> Started:
        """Start the schedule's run of that time, or what is left to do of an earlier start.

        Any number of starts of one run make one batch. Raises StoreOutage and BrokerUnavailable; it is then
        to be called again.
        """
        log = RunLog(self.store, schedule.tenant, schedule.name)
        run_id = run_id_of(schedule.name, scheduled_at)
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
                self.publish(feed_message(tenant, run_id, chain=secrets.token_hex(6)))
            else:
                # Feeding it would take what the next run takes.
                _log.error("run %s: %s", run_id, taken.error)
                self.publish(assemble_message(tenant, run_id, error=taken.error))
        return Started(run, batch)

    def _settled(self, log: RunLog, place: int) -> Snapshot:
        """What the run in a place takes; those in the places before it are settled first."""
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
            # Whatever is wrong with it, the run has its place: unsettled, it would hold up all that follow.
            made = unchanged.model_copy(update={"error": error.message})
        # A run makes its batch once it is settled: one that is there now is another's, and what this run took
        # would never be fed. Looked at last, as the listing may take long.
        if self.batches.load(schedule.tenant, run.run_id) is not None:
            made = unchanged.model_copy(update={"error": _id_taken(run.run_id)})
        kept = log.settle(run.run_id, made)
        if kept.token != token or kept.error is not None:  # another starter was faster, or nothing is taken
            self.store.delete(input_key(schedule.tenant, run.run_id, token))
            self.store.delete(log.seen_key(token))
        elif kept.seen == token and seen is not None:
            self.store.delete(log.seen_key(seen))  # nothing goes by it any more
        return kept

    def _list(self, log: RunLog, run: Run, token: str, base: str | None) -> int:
        """Write the run's JSONL of new objects, and its list of all; gives how many are new."""
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
        """What the list of an earlier run says; an empty one where there was no run."""
        if token is None:
            return
        try:
            pieces = self.store.stream(log.seen_key(token))
        except ObjectNotFound as error:
            # Deleted by a starter that has settled this run: the next try finds that.
            raise StoreOutage(f"{self.store.location(log.seen_key(token))} is gone") from error
        with closing(pieces):
            for line in read_lines(unpacked(pieces)):
                if line.content:
                    yield Seen(*json.loads(line.content))


def _id_taken(run_id: str) -> str:
    return (
        f"batch {run_id!r} was submitted by somebody else, so that this run could not start: the next run "
        "takes what this one would have; inferq nightly run starts one now"
    )
