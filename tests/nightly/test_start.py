"""Starting runs: what is new is taken once, however often one is started and wherever that is cut off."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

import pytest

from inferq.broker import Message
from inferq.broker.spans import job_trace
from inferq.consumers.nightly.start import Starter
from inferq.producer.nightly.beat import send_start
from inferq.schemas import tracing
from inferq.schemas.schedule import run_id_of
from inferq.storage import BatchStore, ObjectStore, StoreOutage
from inferq.storage.batches.sources import Sources
from inferq.storage.nightly_runs import Run
from tests.traces.collector import Collector

from .conftest import FIRST, SECOND, THIRD, CutOff, CutStore, NightSite


def test_a_run_takes_what_is_new_since_the_last_by_key_and_etag(site: NightSite) -> None:
    site.put("a", "b", "c", "d")
    assert site.start(FIRST) == ["a", "b", "c", "d"]
    site.put("b", content="changed")
    site.put("bb")
    site.delete("c")
    assert site.start(SECOND) == ["b", "bb"]
    site.put("c")  # gone for a night, and new again
    assert site.start(THIRD) == ["c"]


def test_a_field_of_a_later_version_goes_on_with_the_run_of_its_schedule(site: NightSite) -> None:
    site.put("a.png")
    run = site.starter.start(site.schedule(from_a_later_version=1), FIRST).run
    again = Run.model_validate(site.log().at(0).model_dump(mode="json"))
    for each in (run, again):
        assert each.schedule.model_extra == {"from_a_later_version": 1}


def test_what_comes_while_a_run_lists_is_taken_by_the_next(
    site: NightSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("a", "c")
    listed = site.starter.sources.objects

    def slow(source: str) -> Any:
        for found in listed(source):
            site.put("b")
            yield found

    monkeypatch.setattr(site.starter.sources, "objects", slow)
    assert site.start(FIRST) == ["a", "c"]
    monkeypatch.undo()
    assert site.start(SECOND) == ["b"]


def test_a_second_start_of_a_run_finds_what_it_took(site: NightSite) -> None:
    site.put("a")
    assert site.start(FIRST) == ["a"]
    site.put("b")
    assert site.start(FIRST) == ["a"]
    assert site.start(SECOND) == ["b"]
    assert site.start(FIRST) == ["a"]
    assert site.log().last() == site.log().at(1)


def test_starts_at_the_same_time_make_one_batch(site: NightSite) -> None:
    site.put("a", "b")

    def started(moment: datetime) -> list[str]:
        while True:
            # A faster starter may delete what a slower one still reads: the job is then tried again.
            with suppress(StoreOutage):
                return site.start(moment)

    with ThreadPoolExecutor(6) as threads:
        taken = list(threads.map(started, [FIRST, SECOND] * 3))
    for names in (taken[0::2], taken[1::2]):
        assert names == [names[0]] * 3
    assert sorted([*taken[0], *taken[1]]) == ["a", "b"]


@pytest.mark.parametrize("reads", range(1, 4))
def test_a_starter_that_stalls_gives_a_run_no_second_place(
    site: NightSite, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    first, second = (
        Run(run_id=run_id_of("invoices", moment), scheduled_at=moment, schedule=site.schedule())
        for moment in (FIRST, SECOND)
    )
    get = site.store.get
    left = reads

    def stalling(key: str) -> bytes:
        nonlocal left
        try:
            return get(key)
        finally:
            left -= 1
            if left == 0:
                monkeypatch.undo()
                site.log().claim(first)
                site.log().claim(second)

    monkeypatch.setattr(site.store, "get", stalling)
    assert site.log().claim(first) == 0
    monkeypatch.undo()
    assert [site.log().claim(run) for run in (first, second)] == [0, 1]
    assert site.log().last() == second


@pytest.mark.parametrize("other_first", [False, True])
@pytest.mark.parametrize("writes", range(11))
def test_a_start_that_is_cut_off_anywhere_loses_nothing_and_takes_nothing_twice(
    site: NightSite, writes: int, other_first: bool
) -> None:
    site.put("a", "b")
    cut = cast(ObjectStore, CutStore(site.store, writes))
    batches = BatchStore(cut)
    starter = Starter(cut, batches, Sources(cut, batches, site.settings), site.sent.append)
    cut_off = True
    try:
        starter.start(site.schedule(), FIRST)
        cut_off = False
    except CutOff:
        pass
    assert cut_off == (writes < 10)
    site.put("c")
    if other_first:
        second = site.start(SECOND)
        first = site.start(FIRST)
    else:
        first = site.start(FIRST)
        second = site.start(SECOND)
    assert sorted(first + second) == ["a", "b", "c"]
    assert site.start(FIRST) == first
    assert site.start(SECOND) == second
    assert site.start(THIRD) == []


@pytest.mark.parametrize("only_new", [True, False])
def test_a_run_whose_id_is_anothers_fails_and_leaves_its_objects_to_the_next(
    site: NightSite, monkeypatch: pytest.MonkeyPatch, only_new: bool
) -> None:
    site.put("a")
    assert site.start(FIRST) == ["a"]
    site.put("b")
    site.sent.clear()
    theirs = run_id_of("invoices", SECOND)
    listed = site.starter.sources.objects

    def slow(source: str) -> Any:
        yield from listed(source)
        site.squat(theirs)  # as late as that

    monkeypatch.setattr(site.starter.sources, "objects", slow)
    if not only_new:
        site.squat(theirs)
    for _ in range(2):
        run, batch, error = site.starter.start(site.schedule(only_new=only_new), SECOND)
        assert (run.run_id, batch) == (theirs, None)
        assert f"batch '{theirs}' was submitted by another client" in (error or "")
    assert site.sent == []
    assert site.batches.source("default", theirs) is None
    assert list(site.store.list(f"batches/default/{theirs}/input/")) == []
    monkeypatch.undo()
    assert site.start(THIRD) == ["b"]


def test_an_earlier_run_whose_id_is_anothers_takes_nothing_from_a_later_one(site: NightSite) -> None:
    site.put("a")
    run_id = run_id_of("invoices", FIRST)
    site.log().claim(Run(run_id=run_id, scheduled_at=FIRST, schedule=site.schedule()))
    site.squat(run_id)
    assert site.start(SECOND) == ["a"]
    assert site.starter.start(site.schedule(), FIRST).batch is None


def test_a_run_with_nothing_new_is_a_batch_without_tasks(site: NightSite) -> None:
    assert site.start(FIRST) == []
    source = site.batches.source("default", "invoices-20261124T003000Z")
    assert source is not None
    assert source.total == 0
    batch = site.batches.load("default", "invoices-20261124T003000Z")
    assert batch is not None
    assert batch.metadata["new_objects"] == 0
    assert site.jobs() == ["batches.feed"]


def test_a_source_that_cannot_be_listed_fails_the_run_and_is_taken_by_the_next(
    site: NightSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("a")
    assert site.start(FIRST) == ["a"]
    site.put("b")
    forbidden = replace(
        site.starter,
        sources=Sources(site.store, site.batches, site.settings.model_copy(update={"fetch_s3_buckets": ()})),
    )
    site.sent.clear()
    forbidden.start(site.schedule(), SECOND)
    assert site.jobs() == ["batches.assemble"]
    assert "INFERQ_FETCH_S3_BUCKETS" in site.sent[0].body.decode()
    assert site.start(SECOND) == []  # it stays failed: what a run took is settled once
    assert site.start(THIRD) == ["b"]


def test_a_bucket_that_does_not_exist_is_said_to(site: NightSite) -> None:
    settings = site.settings.model_copy(update={"fetch_s3_buckets": ("nowhere-1",)})
    starter = replace(site.starter, sources=Sources(site.store, site.batches, settings))
    starter.start(site.schedule(source="s3://nowhere-1/in/"), FIRST)
    assert "nowhere-1" in site.sent[0].body.decode()
    assert site.jobs() == ["batches.assemble"]


@pytest.mark.parametrize("source", ["s3://scans//in/", "s3://my_bucket/in/", "s3://ab/in/"])
def test_a_source_that_no_bucket_can_be_fails_the_run_and_not_the_next(site: NightSite, source: str) -> None:
    site.put("a")
    site.starter.start(site.schedule(source=source), FIRST)
    assert site.jobs() == ["batches.assemble"]
    assert site.start(SECOND) == ["a"]


def test_another_source_is_new_as_a_whole(site: NightSite) -> None:
    site.put("a", "deep/a")
    assert site.start(FIRST) == ["a", "a"]
    assert site.start(SECOND, source=f"s3://{site.bucket}/in/deep/") == ["a"]


def test_a_run_that_takes_everything_leaves_what_is_new_as_it_was(site: NightSite) -> None:
    site.put("a")
    assert site.start(FIRST) == ["a"]
    site.put("b")
    assert site.start(SECOND, only_new=False) == []  # its feeder lists the source
    assert site.batches.source("default", "invoices-20261125T003000Z") is None
    assert site.start(THIRD) == ["b"]


def test_lists_of_what_was_there_do_not_pile_up(site: NightSite) -> None:
    site.put("a")
    for moment in (FIRST, SECOND, THIRD):
        site.start(moment)
    assert len(list(site.store.list("nightly/default/invoices/seen/"))) == 1


def test_keys_that_json_and_urls_find_hard_are_new_once(site: NightSite) -> None:
    names = ["Grüße 你好.png", 'a"b.png', "a b+c%20.png", "a\\n.png"]
    site.put(*names)
    assert sorted(site.start(FIRST)) == sorted(names)
    assert site.start(SECOND) == []


def test_the_trace_of_a_run_goes_on_from_beat_to_the_feeding_of_its_batch(
    site: NightSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("a")
    with Collector() as collector:
        for name, value in collector.settings().items():
            monkeypatch.setenv(name, value)
        with tracing.exporting("beat"):
            send_start(site.schedule(), FIRST, site.sent.append)
    (sent,) = collector.spans
    assert (sent.name, sent.kind, sent.service) == ("send inference.batches", "producer", "inferq-beat")
    trace = job_trace(_arguments(site.sent.pop())["trace"])
    assert trace is not None
    assert (trace.trace_id, trace.traceparent[36:52]) == (sent.trace_id, sent.span_id)
    replace(site.starter, trace=trace).start(site.schedule(), FIRST)
    assert _arguments(site.sent.pop())["trace"] == trace.headers()


def _arguments(job: Message) -> dict[str, Any]:
    arguments: dict[str, Any] = json.loads(job.body)[1]
    return arguments
