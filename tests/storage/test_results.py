"""A task ends once: what is kept of several results, and whose artifacts survive."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.schemas import Artifact, ErrorInfo, InvalidTask, Result
from inferq.storage import (
    BadObjectKey,
    ObjectNotFound,
    ObjectStore,
    ResultStore,
    StoreOutage,
    UnreadableResult,
    folder,
    upload_key,
)
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.store import check_key, side_by_side

Race = Callable[[int, Callable[[int], object]], list[object]]
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def result(status: str, *, worker: str = "w", redrives: int = 0, **more: Any) -> Result:
    error = None if status == "succeeded" else ErrorInfo(code="c", message="m", retryable=True)
    return Result(
        **{
            "task_id": "t1", "task_type": "echo", "tenant": "default", "status": status, "attempts": 1,
            "finished_at": NOW, "worker": worker, "redrives": redrives, "error": error, **more,
        }
    )  # fmt: skip


@pytest.fixture
def results(store: ObjectStore) -> ResultStore:
    return ResultStore(store)


def keys(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list()]


def test_nothing_is_known_of_a_task_that_has_not_ended(results: ResultStore) -> None:
    assert results.load("default", "t1") is None


def test_a_result_that_is_listed_and_then_absent_is_an_outage(
    results: ResultStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.save(result("succeeded"))

    def absent(key: str) -> bytes:
        raise ObjectNotFound(key)

    monkeypatch.setattr(store, "get", absent)
    with pytest.raises(StoreOutage, match="contradicts"):
        results.load("default", "t1")
    with pytest.raises(StoreOutage, match="contradicts"):
        results.save(result("succeeded", worker="another"))


def test_a_saved_result_is_loaded_as_it_was(results: ResultStore, store: ObjectStore) -> None:
    saved = result("succeeded", output={"text": "名前 😀"}, metadata={"k": [1, None]})
    assert results.save(saved) == saved
    assert results.load("default", "t1") == saved
    assert keys(store) == ["tasks/default/t1/result.json"]
    assert store.stat("tasks/default/t1/result.json").content_type == "application/json"


def test_text_that_is_not_unicode_does_not_lose_the_result(results: ResultStore) -> None:
    results.save(result("succeeded", output={"text": "名前 \ud83d!"}))
    loaded = results.load("default", "t1")
    assert loaded
    assert loaded.output == {"text": "名前 ?!"}


def test_tenants_do_not_see_each_other(results: ResultStore) -> None:
    results.save(result("succeeded", tenant="a"))
    assert results.load("b", "t1") is None


def test_the_first_success_stands(results: ResultStore) -> None:
    first, second = result("succeeded", worker="one"), result("succeeded", worker="two", redrives=3)
    assert results.save(first) == first
    assert results.save(second) == first
    assert results.save(result("failed", redrives=9)) == first
    assert results.load("default", "t1") == first


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_failure_stands_until_a_success_or_a_later_redrive(results: ResultStore, status: str) -> None:
    first = result(status, worker="one", redrives=1)
    assert results.save(first) == first
    assert results.save(result("failed", worker="two", redrives=1)) == first
    assert results.save(result("cancelled", worker="two", redrives=0)) == first
    later = result("failed", worker="three", redrives=2)
    assert results.save(later) == later
    assert results.load("default", "t1") == later
    success = result("succeeded", worker="four")
    assert results.save(success) == success
    assert results.load("default", "t1") == success


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_of_racing_writers_all_learn_of_the_same_winner(
    results: ResultStore, race: Race, status: str
) -> None:
    kept = race(12, lambda n: results.save(result(status, worker=f"w{n}")))
    loaded = results.load("default", "t1")
    assert kept == [loaded] * 12


def test_a_success_among_racing_failures_stands(results: ResultStore, race: Race) -> None:
    race(8, lambda n: results.save(result("succeeded" if n == 5 else "failed", worker=f"w{n}", redrives=n)))
    loaded = results.load("default", "t1")
    assert loaded
    assert loaded.worker == "w5"


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_save_whose_reply_was_lost_is_the_callers_own_when_it_is_repeated(
    results: ResultStore, monkeypatch: pytest.MonkeyPatch, store: ObjectStore, status: str
) -> None:
    def lose(method: str) -> None:
        real = getattr(store, method)

        def call(*arguments: Any, **more: Any) -> object:
            monkeypatch.setattr(store, method, real)
            real(*arguments, **more)
            raise StoreOutage("no reply")

        monkeypatch.setattr(store, method, call)

    for redrives, method in ((0, "create"), (1, "put")):
        if status == "succeeded" and redrives:
            return
        mine = result(status, redrives=redrives, output={"text": "\ud83d"} if status == "succeeded" else None)
        lose(method)
        with pytest.raises(StoreOutage):
            results.save(mine)
        assert results.save(mine) is mine
        assert results.save_many([(mine, None)])[0] is mine
        assert results.save(result(status, worker="another", redrives=redrives)) is not mine


def test_a_failure_that_supersedes_another_is_its_callers_own(results: ResultStore) -> None:
    results.save(result("failed"))
    later = result("failed", redrives=1)
    assert results.save(later) is later


def one_by_one(
    results: ResultStore, ends: list[tuple[Result, bytes | None]]
) -> list[Result | UnreadableResult]:
    kept: list[Result | UnreadableResult] = []
    for end, output in ends:
        try:
            kept.append(results.save(end, output))
        except UnreadableResult as error:
            kept.append(error)
    return kept


class _SideBySide(LocalStore):
    """A folder that is used like S3."""

    def side_by_side(self, calls: Sequence[Callable[[], Any]]) -> Sequence[Any]:
        with ThreadPoolExecutor(4) as threads:
            return side_by_side(threads, calls)


ENDS = st.builds(
    lambda task_id, status, worker, redrives, digest, output: (
        result(status, task_id=task_id, worker=worker, redrives=redrives, digest=digest),
        output if status == "succeeded" else None,
    ),
    task_id=st.sampled_from(["a", "b", "c", "unreadable"]),
    status=st.sampled_from(["succeeded", "succeeded", "failed", "cancelled"]),
    worker=st.sampled_from(["w1", "w2"]),
    redrives=st.integers(0, 2),
    digest=st.sampled_from([None, "d" * 64]),
    output=st.sampled_from([None, b'{"text": 1}', b'"\\ud83d"']),
)


examples = itertools.count()


@settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    earlier=st.lists(ENDS, max_size=3),
    ends=st.lists(ENDS, min_size=2, max_size=9),
    bad=st.sampled_from(["result", "failure"]),
)
def test_many_are_saved_as_one_after_the_other(
    tmp_path: Path,
    earlier: list[tuple[Result, bytes | None]],
    ends: list[tuple[Result, bytes | None]],
    bad: str,
) -> None:
    seen = []
    for make, many in ((LocalStore, False), (LocalStore, True), (_SideBySide, True)):
        store = make(tmp_path / str(next(examples)), fsync=False)
        results = ResultStore(store)
        store.put(f"tasks/default/unreadable/{bad}.json", b"{}")
        one_by_one(results, earlier)
        kept = results.save_many(ends) if many else one_by_one(results, ends)
        own = [one is end for one, (end, _) in zip(kept, ends, strict=True)]
        readable = [None if isinstance(one, UnreadableResult) else one for one in kept]
        seen.append((readable, own, {key: store.get(key) for key in keys(store)}))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_many_are_loaded_in_order_and_an_unreadable_one_takes_its_place(
    results: ResultStore, store: ObjectStore
) -> None:
    first, third = result("succeeded", task_id="1"), result("failed", task_id="3")
    results.save_many([(first, None), (third, None)])
    store.put("tasks/default/2/result.json", b"{}")
    loaded = results.load_many([("default", task_id) for task_id in "3210"] + [("other", "1")])
    assert [*loaded[:1], *loaded[2:]] == [third, first, None, None]
    assert isinstance(loaded[1], UnreadableResult)


def test_an_outage_is_of_all_that_are_saved_or_loaded_together(
    results: ResultStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [
        (result("failed" if number > 3 else "succeeded", task_id=str(number)), None) for number in range(6)
    ]
    real = store.get

    def fail(key: str, *_: object, **__: object) -> bytes:
        if "/4/" in key:
            raise StoreOutage("away")
        return real(key)

    with monkeypatch.context() as patch:
        patch.setattr(store, "create", fail)
        patch.setattr(store, "create_many", lambda items, **_: [True] * len(items))
        with pytest.raises(StoreOutage, match="away"):
            results.save_many(ends)
    kept = results.save_many(ends)
    assert [one is end for one, (end, _) in zip(kept, ends, strict=True)] == [True] * 6
    monkeypatch.setattr(store, "get", fail)
    with pytest.raises(StoreOutage, match="away"):
        results.load_many([("default", str(number)) for number in range(6)])


def test_what_is_not_a_result_is_said_to_be_so(results: ResultStore, store: ObjectStore) -> None:
    store.put("tasks/default/t1/result.json", b'{"half": ')
    with pytest.raises(UnreadableResult, match=r"result\.json"):
        results.load("default", "t1")


class Counting(LocalStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root, fsync=False)
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in {"get", "put", "create", "list", "stat", "stream"}:
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)


def test_the_hot_path_takes_one_trip_each_way(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    results = ResultStore(store)
    results.load("default", "t1")
    results.save(result("succeeded"))
    assert store.calls == ["list", "create"]


def test_many_artifacts_do_not_hide_the_result(
    results: ResultStore, store: ObjectStore, tmp_path: Path
) -> None:
    for number in range(30):
        store.put(f"tasks/default/t1/artifacts/token/{number}", b"")
    store.put("tasks/default/t1/artifacts/result.json/result.json", b"{}")
    assert results.load("default", "t1") is None
    results.save(result("failed"))
    loaded = results.load("default", "t1")
    assert loaded
    assert loaded.status == "failed"


def save(results: ResultStore, tmp_path: Path, name: str, data: bytes, token: str) -> Artifact:
    path = tmp_path / "artifact"
    path.write_bytes(data)
    return results.save_artifact("default", "t1", name, path, "image/png", run=token)


@pytest.mark.parametrize("name", ["out.png", "名 前+%2F?#.png", "result.json.png", "x" * 255])
def test_an_artifact_is_found_by_its_name(
    results: ResultStore, store: ObjectStore, tmp_path: Path, name: str
) -> None:
    artifact = save(results, tmp_path, name, b"pixels", "tok-1")
    assert artifact.name == name
    assert artifact.bytes == 6
    assert artifact.content_type == "image/png"
    assert artifact.sha256 == hashlib.sha256(b"pixels").hexdigest()
    kept = results.save(result("succeeded", artifacts=(artifact,)))
    key = results.artifact_key("default", "t1", name)
    assert results.artifact_key("default", "t1", name, result=kept) == key
    assert store.get(key) == b"pixels"
    assert store.location(key) == artifact.url
    with pytest.raises(ObjectNotFound):
        results.artifact_key("default", "t1", "other")


def test_no_artifact_is_found_before_the_result(results: ResultStore, tmp_path: Path) -> None:
    save(results, tmp_path, "out.png", b"pixels", "tok-1")
    with pytest.raises(ObjectNotFound):
        results.artifact_key("default", "t1", "out.png")


def test_the_loser_discards_its_own_artifacts_and_only_those(
    results: ResultStore, store: ObjectStore, tmp_path: Path
) -> None:
    mine = save(results, tmp_path, "out.png", b"mine", "a")
    theirs = save(results, tmp_path, "out.png", b"theirs", "ab")
    save(results, tmp_path, "more.png", b"theirs", "ab")
    kept = results.save(result("succeeded", worker="me", artifacts=(mine,)))
    lost = result("succeeded", worker="they", artifacts=(theirs,))
    assert results.save(lost) == kept
    results.discard("default", "t1", run="ab")
    assert store.get(results.artifact_key("default", "t1", "out.png")) == b"mine"
    assert keys(store) == ["tasks/default/t1/artifacts/a/out.png", "tasks/default/t1/result.json"]
    results.discard("default", "t1", run="a")
    results.discard("default", "t1", run="never-ran")
    assert store.get(results.artifact_key("default", "t1", "out.png")) == b"mine", "the winner's stay"


@pytest.mark.parametrize("token", ["", ".", "..", "a/b", ".hidden", "../../other"])
def test_a_run_is_a_plain_name(results: ResultStore, token: str) -> None:
    with pytest.raises(ValueError, match="token"):
        results.discard("default", "t1", run=token)


@pytest.mark.parametrize("name", ["..", "a/../../b", "", "nul\0"])
def test_an_artifact_name_cannot_leave_the_attempt(results: ResultStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(BadObjectKey):
        save(results, tmp_path, name, b"", "token")


def test_an_artifact_is_found_after_the_store_has_moved(tmp_path: Path) -> None:
    old = ResultStore(LocalStore(tmp_path / "old", fsync=False))
    old.save(result("succeeded", artifacts=(save(old, tmp_path, "o u t.png", b"x", "tok"),)))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = LocalStore(tmp_path / "new")
    assert moved.get(ResultStore(moved).artifact_key("default", "t1", "o u t.png")) == b"x"


names = st.text(min_size=1, max_size=80)


@given(tenant=names, task_id=names, other=names)
def test_a_folder_is_its_tasks_own(tenant: str, task_id: str, other: str) -> None:
    place = folder(tenant, task_id)
    assert place.startswith("tasks/")
    assert place.endswith("/")
    assert place.count("/") == 3
    try:
        check_key(place + "result.json")
    except BadObjectKey as error:
        assert "longer" in str(error)
    assert (folder(tenant, other) == place) == (other == task_id)


@pytest.mark.parametrize("task_id", [".", "..", "%2E", "../../x", "a/b"])
def test_ids_that_look_like_paths_do_not_escape(tmp_path: Path, task_id: str) -> None:
    store = LocalStore(tmp_path, fsync=False)
    store.put(folder(task_id, task_id) + "x", b"")
    assert keys(store)[0].count("/") == 3
    assert ResultStore(store).load(task_id, task_id) is None


def test_an_uploads_key_is_its_tenants() -> None:
    assert upload_key("acme", "01-ab_C.png") == "files/acme/01-ab_C.png"
    assert upload_key("..", ".") == "files/%2E%2E/%2E"
    for bad in ("", "a/b", "../x", "x" * 201, "a b", "a%2fb", "a\n"):
        with pytest.raises(InvalidTask):
            upload_key("acme", bad)
