"""The result cache: what was computed before for a tenant is answered without the engine, never wrongly."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.worker.result_cache import ResultCache, result_key
from inferq.schemas import EngineInfo, Result, Settings, get_type, parse_task
from inferq.storage import LocalStore, ResultStore
from tests.waiting import eventually
from tests.worker.conftest import Site, starts

ON = {"INFERQ_RESULT_CACHE": "true"}


class EngineSettings(Settings):
    threads: int = 1


class Shared(EngineSettings):
    gpu_memory_fraction: float | None = None


ENGINE = EngineInfo(name="lac", version="1", model="small", device="cpu", weights=("lac 3",))


def key(
    engine: EngineInfo = ENGINE,
    settings: Settings | None = None,
    contents: dict[str, list[str | None]] | None = None,
    version: str = "1",
    **fields: Any,
) -> str:
    task = parse_task({"task_id": "t", "task_type": "ocr", "image_url": "inferq:a.png", **fields})
    given = {"image_url": ["aa", "image/png"]} if contents is None else contents
    return result_key(task, given, engine, settings or EngineSettings(), version)


def test_the_same_work_has_the_same_key_whoever_asks_for_it() -> None:
    same = [
        key(task_id="another", tenant="b", priority="high", metadata={"a": 1}, batch_id="b"),
        key(image_url="https://example.com/the-same-picture.png", time_limit=5),
        key(callback_url="https://example.com/", expires_at="2030-01-01T00:00:00Z"),
        key(options={"annotated": False}),  # the default, spelled out
    ]
    assert set(same) == {key()}
    first, second = (ENGINE.model_copy(update={"device": f"cuda:{number} (bfloat16)"}) for number in (0, 1))
    assert key(engine=first) == key(engine=second)
    assert key(settings=Shared()) == key(settings=Shared(gpu_memory_fraction=0.5))


@pytest.mark.parametrize(
    "other",
    [
        {"contents": {"image_url": ["bb", "image/png"]}},
        {"contents": {"image_url": ["aa", "application/pdf"]}},
        {"options": {"annotated": True}},
        {"settings": EngineSettings(threads=2)},
        {"version": "2"},
        *(
            {"engine": ENGINE.model_copy(update=update)}
            for update in (
                {"name": "x"},
                {"version": "2"},
                {"model": "large"},
                {"weights": ("lac 4",)},
                {"device": "cuda:0"},
                {"precision": "bf16"},
            )
        ),
    ],
)
def test_whatever_may_change_the_output_changes_the_key(other: dict[str, Any]) -> None:
    assert key(**other) != key()


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_texts_share_a_key_only_if_they_are_equal(one: str, other: str) -> None:
    def of(text: str) -> str:
        task = get_type("ner").task.model_validate(
            {"task_id": "t", "task_type": "ner", "text": text}, strict=False
        )
        return result_key(task, {}, ENGINE, None, "1")

    try:
        keys = of(one), of(other)
    except ValueError:
        return  # not a text that a task may have
    assert (keys[0] == keys[1]) == (one == other)


@pytest.mark.parametrize(("where", "cached"), [("weights:pp-ocr", True), ("/models/pp-ocr", False)])
def test_what_a_folder_without_a_version_holds_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, cached: bool
) -> None:
    monkeypatch.setenv("INFERQ_OCR_MODEL_DIR", where)
    store = LocalStore(tmp_path, fsync=False)
    cache = ResultCache(get_type("ocr"), store, ResultStore(store))
    task = parse_task({"task_id": "t", "task_type": "ocr", "image_url": "inferq:a.png"})
    assert (cache.key(task, {}, ENGINE) is not None) == cached


def test_only_a_seed_makes_music_the_same_again_unless_its_owner_takes_any() -> None:
    music = {"task_id": "t", "task_type": "acestep", "prompt": "calm piano"}
    cacheable = get_type("acestep").cacheable
    assert not cacheable(parse_task(music))
    assert cacheable(parse_task({**music, "seed": 1}))
    assert cacheable(parse_task({**music, "options": {"reuse": True}}))
    assert not cacheable(parse_task({**music, "options": {"reuse": False}}))
    assert not get_type("echo").cacheable(parse_task({"task_id": "t", "task_type": "echo"}))


def submit(site: Site, marker: Path, tenant: str = "default", **fields: Any) -> str:
    site.store.put(f"files/{tenant}/in.txt", b"the same content")
    site.store.put(f"files/{tenant}/in2.txt", b"the same content")
    return site.publish(
        {"tenant": tenant, "file_url": "inferq:in.txt", "options": {"marker": str(marker)}, **fields}
    )


def test_a_repeated_task_is_answered_without_the_engine(site: Site, tmp_path: Path) -> None:
    worker = site.worker(**ON)
    first = site.ended(submit(site, tmp_path / "m", fault="artifact"))
    again = site.ended(submit(site, tmp_path / "m", fault="artifact", file_url="inferq:in2.txt"))
    assert starts(tmp_path / "m") == 1
    assert (first.cached, again.cached) == (False, True)
    assert again.output == first.output
    assert again.engine == first.engine
    assert [a.sha256 for a in again.artifacts] == [a.sha256 for a in first.artifacts]
    # The copy stands alone: the first task's folder may go.
    for info in site.store.list(f"tasks/default/{first.task_id}/"):
        site.store.delete(info.key)
    kept = site.results.artifact_key("default", again.task_id, "note.txt")
    assert site.store.get(kept) == b"a note"
    page = worker.get("/metrics").text
    for outcome in ("miss", "hit"):
        assert f'inferq_cache_requests_total{{outcome="{outcome}",task_type="faulty"}} 1.0' in page
    seconds = {
        line.split()[0].removeprefix("inferq_engine_"): float(line.split()[1])
        for line in page.splitlines()
        if re.match(r"inferq_engine_\w+_seconds_total", line)
    }
    alive = seconds.pop('alive_seconds_total{task_type="faulty"}')
    assert sum(seconds.values()) == pytest.approx(alive)
    assert seconds['busy_seconds_total{task_type="faulty"}'] > 0
    (used,) = eventually(
        lambda: (u := site.status.usage([first.finished_at.date()])) and u[0].tasks == 2 and u
    )
    assert (used.succeeded, used.engine_seconds) == (2, pytest.approx(first.timings.inference, abs=0.5))


def test_it_is_off_unless_it_is_asked_for(site: Site, tmp_path: Path) -> None:
    site.worker()
    for _ in range(2):
        assert not site.ended(submit(site, tmp_path / "m")).cached
    assert starts(tmp_path / "m") == 2
    assert not list(site.store.list("cache/"))


def test_no_tenant_gets_what_was_computed_for_another(site: Site, tmp_path: Path) -> None:
    site.worker(**ON)
    site.ended(submit(site, tmp_path / "m"))
    task_id = submit(site, tmp_path / "m", tenant="other")
    result = eventually(lambda: site.results.load("other", task_id))
    assert not result.cached
    assert starts(tmp_path / "m") == 2


@pytest.mark.parametrize("lost", ["tasks/", "artifacts/", "entry"])
def test_what_no_longer_stands_is_computed_anew(site: Site, tmp_path: Path, lost: str) -> None:
    site.worker(**ON)
    first = site.ended(submit(site, tmp_path / "m", fault="artifact"))
    # The entry comes after the result that can be seen, and before the ack.
    (entry,) = eventually(lambda: list(site.store.list("cache/")))
    if lost == "entry":
        site.store.put(entry.key, b"not JSON")
    else:
        for info in list(site.store.list(f"tasks/default/{first.task_id}/")):
            if lost == "tasks/" or lost in info.key:
                site.store.delete(info.key)
    again = site.ended(submit(site, tmp_path / "m", fault="artifact"))
    assert not again.cached
    assert starts(tmp_path / "m") == 2
    # And what was computed anew is found from now on; its entry, too, comes after its result.
    eventually(lambda: again.task_id.encode() in site.store.get(entry.key))
    assert site.ended(submit(site, tmp_path / "m", fault="artifact")).cached


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "d2"},
        {"finished_at": datetime(2026, 1, 2, tzinfo=UTC)},
        {"task_type": "ner"},
        {"status": "failed"},
    ],
)
def test_what_an_id_that_is_used_again_came_to_is_not_handed_on(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    store = LocalStore(tmp_path, fsync=False)
    results = ResultStore(store)
    cache = ResultCache(get_type("ocr"), store, results)
    result = Result(
        task_id="letters.1", task_type="ocr", tenant="default", status="succeeded", output="AAA",
        attempts=1, finished_at=datetime(2026, 1, 1, tzinfo=UTC), digest="d1",
    )  # fmt: skip
    cache.keep(results.save(result), "aa")
    found = cache.find("default", "aa", tmp_path)
    assert found is not None
    assert found.output == b'"AAA"'
    for info in list(store.list("tasks/")):
        store.delete(info.key)
    results.save(result.model_copy(update={"output": "BBB", **other}))
    assert cache.find("default", "aa", tmp_path) is None


def test_an_artifact_that_was_changed_is_not_handed_on(site: Site, tmp_path: Path) -> None:
    site.worker(**ON)
    first = site.ended(submit(site, tmp_path / "m", fault="artifact"))
    site.store.put(site.results.artifact_key("default", first.task_id, "note.txt"), b"forged")
    assert not site.ended(submit(site, tmp_path / "m", fault="artifact")).cached


def test_failures_are_never_cached(site: Site, tmp_path: Path) -> None:
    site.worker(**ON)
    for _ in range(2):
        assert site.ended(submit(site, tmp_path / uuid.uuid4().hex, fault="invalid")).status == "failed"
    assert not list(site.store.list("cache/"))
