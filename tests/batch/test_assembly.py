"""A batch's window, its versions, and the files that are put together of its results."""

from __future__ import annotations

import itertools
import json
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import JsonValue

from inferq.consumers.batches.assembly import end
from inferq.consumers.batches.feeder import Assemble, GoOn, Nothing
from inferq.consumers.batches.recount import Recount
from inferq.schemas import Result
from inferq.storage import BatchConflict
from inferq.storage.batches.sources import Cursor
from tests.batch.conftest import BatchSite, QuickWorker
from tests.batch.sources import lines, payloads


def test_outside_its_window_nothing_is_fed(site: BatchSite) -> None:
    window = {"start": "00:00", "end": "00:01", "time_zone": "Etc/GMT-14"}
    batch = site.batch(lines(5), window=window)
    match site.slice(batch):
        case GoOn(cursor, seconds):
            assert cursor.line == 0
            assert 1 <= seconds <= 30
        case other:
            raise AssertionError(other)
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert standing.state == "paused"
    assert standing.counts.queued == 0


def test_what_has_ended_in_a_closed_window_is_put_together_without_waiting_for_it_to_open(
    site: BatchSite,
) -> None:
    moments = [datetime(2026, 11, 24, 23, 0, tzinfo=UTC)]
    site.change(settings={"batch_slice": 0.3}, clock=lambda: moments[-1])
    batch = site.batch(lines(20), window={"start": "22:00", "end": "06:00", "time_zone": "UTC"})
    fed = site.slice(batch)
    assert isinstance(fed, GoOn)
    moments.append(datetime(2026, 11, 25, 21, 0, tzinfo=UTC))
    site.services.index.ends("default", batch.batch_id, "succeeded", range(1, 21))
    assert site.slice(batch, fed.cursor, part=1) == Assemble()


def test_the_object_store_is_asked_more_and_more_seldom_for_ends_that_do_not_come(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes a second further each time that it is looked at."""
    seconds = itertools.count()
    asked: list[int] = []
    monkeypatch.setattr(Recount, "in_flight", lambda _: asked.append(next(seconds)))
    began = datetime(2026, 11, 24, tzinfo=UTC)
    site.change(
        settings={"batch_slice": 0.3, "batch_doubt": 3},
        clock=lambda: began + timedelta(seconds=next(seconds)),
    )
    batch = site.batch(lines(5))
    cursor, part = Cursor(), 0
    while len(asked) < 4:
        match site.slice(batch, cursor, part=part):
            case GoOn(cursor, _):
                part += 1
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert part > len(asked)  # no slice lasts until then
    assert all(later > 1.5 * earlier for earlier, later in pairwise(pauses))


def test_the_same_batch_is_one_batch_and_another_is_refused(site: BatchSite) -> None:
    batch = site.batch(lines(1), batch_id="twice")
    again = batch.model_copy(update={"created_at": batch.created_at.replace(year=2030)})
    assert site.services.batches.create(again) == batch
    with pytest.raises(BatchConflict, match="another content"):
        site.services.batches.create(again.model_copy(update={"priority": "high"}))


def test_a_batch_that_an_older_version_accepted_is_listed_once_it_is_fed(
    site: BatchSite, worker: QuickWorker
) -> None:
    site.batch(lines(1), batch_id="first")
    batches = site.services.batches
    batch = site.batch(lines(1), batch_id="older")
    for info in site.services.store.list("batches/default/~times/"):
        site.services.store.delete(info.key)
    assert batches.newest("default", limit=9) == []
    site.finish(batch)
    assert [entry.batch_id for entry in batches.newest("default", limit=9)] == ["older"]


@pytest.mark.parametrize("step", ["a later slice", "assembly"])
def test_a_batch_that_an_older_version_began_is_listed_by_each_later_step(site: BatchSite, step: str) -> None:
    site.batch(b"", batch_id="first")
    batches = site.services.batches
    batch = site.batch(b"", batch_id="older")
    for info in site.services.store.list("batches/default/~times/"):
        site.services.store.delete(info.key)
    assert batches.newest("default", limit=9) == []
    if step == "assembly":
        end(site.services, batch)
    else:
        site.slice(batch, part=1)
    assert [entry.batch_id for entry in batches.newest("default", limit=9)] == ["older"]


def test_a_batch_of_a_later_version_is_fed_by_what_this_one_knows(
    site: BatchSite, worker: QuickWorker
) -> None:
    batch = site.batch(lines(3), window={"start": "00:00", "end": "00:00"})
    key = f"batches/default/{batch.batch_id}/batch.json"
    record = json.loads(site.services.store.get(key)) | {"retention": "30d"}
    record["window"]["days"] = "mon-fri"
    site.services.store.put(key, json.dumps(record).encode())
    assert site.services.batches.create(batch) == site.services.batches.load("default", batch.batch_id)
    assert site.finish(batch).counts.succeeded == 3


def test_the_lines_that_the_result_cache_answered_are_counted_and_marked(
    site: BatchSite, worker: QuickWorker
) -> None:
    payload = b'{"payload": "%s"}\n'
    batch = site.batch(b"".join(payload % word for word in (b"new", b"again", b"again", b"fail")))
    summary = site.finish(batch)
    assert (summary.counts.succeeded, summary.counts.failed, summary.counts.cached) == (3, 1, 2)
    assert [line.get("cached") for line in site.output(batch)] == [None, True, True]
    standing = site.services.index.look("default", batch.batch_id)
    assert standing is not None
    assert standing.counts.cached == 2


@pytest.mark.parametrize(("task_id", "segment"), [("..", "%2E%2E"), ("scan:1", "scan:1")])
def test_an_artifacts_url_in_the_output_is_safe_for_any_id(
    site: BatchSite, tmp_path: Path, task_id: str, segment: str
) -> None:
    batch = site.batch(json.dumps({"task_id": task_id, "payload": 1}).encode())
    services = site.services
    services.sources.settle(batch)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    artifact = services.results.save_artifact("default", task_id, "a/b c.txt", file, "text/plain", run="1-a")
    done = Result(
        task_id=task_id, task_type="echo", tenant="default", attempts=1, finished_at=datetime.now(UTC),
        batch_id=batch.batch_id, batch_line=1, digest="d", status="succeeded", artifacts=(artifact,),
    )  # fmt: skip
    services.results.save(done)
    end(services, batch)
    ((told,),) = (line["artifacts"] for line in site.output(batch))
    address = services.storage.api_url.rstrip("/")
    assert told["url"] == f"{address}/v1/tasks/{segment}/artifacts/a%2Fb%20c.txt"


def test_assembling_twice_gives_the_same_files_and_one_summary(site: BatchSite, worker: QuickWorker) -> None:
    batch = site.batch(lines(30) + b"x\n")
    first = site.finish(batch)
    before = site.output(batch), site.errors(batch)
    assert site.slice(batch) == Nothing()
    assert site.services.batches.summary("default", batch.batch_id) == first
    assert (site.output(batch), site.errors(batch)) == before


def test_as_many_outputs_are_fetched_at_a_time_as_there_are_readers(
    site: BatchSite, worker: QuickWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = site.services.settings.batch_readers
    together = threading.Barrier(readers)

    def output(result: Result) -> JsonValue:
        together.wait(60)
        return {"pages": [{}] * (result.batch_line or 0)}

    monkeypatch.setattr(site.services.results, "output", output)
    batch = site.batch(lines(2 * readers))
    assert site.finish(batch).pages == sum(range(1, 2 * readers + 1))
    assert payloads(site.output(batch)) == list(range(1, 2 * readers + 1))


def test_redis_keeps_nothing_of_a_line_that_has_ended(site: BatchSite, worker: QuickWorker) -> None:
    batch = site.batch(lines(300))
    site.finish(batch)
    left = sorted(key.decode() for key in site.redis.keys("*"))
    assert [key for key in left if not key.startswith(("inferq:batch:", "inferq:bits:"))] == []
    assert json.dumps(left).count(batch.batch_id) == len(left)


def test_a_line_that_is_assembled_too_early_is_not_left_out(site: BatchSite) -> None:
    from inferq.consumers.batches.assembly import Assembly, Unfinished

    batch = site.batch(lines(3))
    assert isinstance(site.slice(batch), GoOn | Assemble)
    with pytest.raises(Unfinished):
        Assembly(site.services, batch).run()
