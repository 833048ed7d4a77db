"""What every object store promises, over a local folder and over S3 of two makes."""

from __future__ import annotations

import hashlib
import io
import os
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from inferq.schemas import InstallationError
from inferq.storage import BadObjectKey, ObjectNotFound, ObjectStore, StorageSettings, StoreOutage, open_store
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.s3 import S3Store

ODD_KEYS = [
    "plain",
    "a b+c&d=e?f#g%20h",
    "日本語/ключ/é.bin",
    "e\u0301/decomposed",
    "🎵/😀.wav",
    "quote'\"<tag>&amp;/back\\slash",
    "..a/...b/-/~",
    ".hidden/file",
    "tasks/default/.%2E/result.json",
    "a:b:c/1.json",
    "x" * 255 + "/" + "y" * 255,
]
BAD_KEYS = [
    "", "/abs", "a//b", "a/", ".", "..", "../x", "a/../b", "a/./b", "a/..", "nul\0", "line\nbreak", "tab\t",
    "\x7f", "\ud800", "x" * 256, "é" * 128, "a/" * 449 + "abc", ".inferq/secret", ".inferq",
]  # fmt: skip

Race = Callable[[int, Callable[[int], object]], list[object]]


class Drip:
    """A stream with nothing but `read`, which gives less than is asked for."""

    def __init__(self, data: bytes, piece: int = 7) -> None:
        self._file = io.BytesIO(data)
        self._piece = piece

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._piece))


class Pattern:
    """An endless-looking stream of `total` bytes that takes no memory."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._block = os.urandom(1 << 16)
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        piece = self._block[: min(count, self._left, len(self._block))]
        self._left -= len(piece)
        self.digest.update(piece)
        return piece


@pytest.fixture(params=["local", "s3", "seaweedfs"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def by_folder(request: pytest.FixtureRequest) -> bool:
    """Whether the store keeps folders: it lists one after the other, and takes a backslash for a slash."""
    return bool(request.node.callspec.params["store"] == "seaweedfs")


_BOUNDED = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
"""For what is ours alone, and takes seconds: another make of S3 adds nothing."""


def test_what_is_put_is_what_one_gets(store: ObjectStore) -> None:
    before = datetime.now(UTC)
    info = store.put("a/b.png", b"pixels", content_type="image/png")
    assert (info.key, info.bytes, info.content_type) == ("a/b.png", 6, "image/png")
    assert store.get("a/b.png") == b"pixels"
    found = store.stat("a/b.png")
    assert (found.key, found.bytes, found.content_type) == ("a/b.png", 6, "image/png")
    assert found.etag == info.etag
    assert abs(found.modified - before) < timedelta(seconds=10)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_work_everywhere(store: ObjectStore, by_folder: bool, key: str) -> None:
    data = key.encode()
    listed = key.replace("\\", "/") if by_folder else key
    store.put(key, data)
    assert store.create(key, b"other", content_type="text/plain") is False
    assert store.get(key) == data
    assert b"".join(store.stream(key)) == data
    assert [info.key for info in store.list()] == [listed]
    assert [info.key for info in store.list(listed)] == [listed]
    assert store.stat(key).bytes == len(data)
    store.delete(key)
    with pytest.raises(ObjectNotFound):
        store.get(key)


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys_are_refused_by_every_method(store: ObjectStore, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(key, b""),
        lambda: store.create(key, b"", content_type="text/plain"),
        lambda: store.create_many([("good", b""), (key, b"")], content_type="text/plain"),
        lambda: store.get(key),
        lambda: store.stream(key),
        lambda: store.stat(key),
        lambda: store.delete(key),
        lambda: store.location(key),
    ]
    for call in calls:
        with pytest.raises(BadObjectKey):
            call()
    assert list(store.list()) == []


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../../", ".inferq/", "a//"])
def test_a_listing_cannot_leave_the_store(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(BadObjectKey):
        store.list(prefix)


def test_what_is_missing_is_not_found_at_the_call(store: ObjectStore) -> None:
    store.put("folder/file", b"")
    for key in ("nothing", "folder", "folder/file/below", "no/such/folder"):
        for call in (store.get, store.stat, store.stream):
            with pytest.raises(ObjectNotFound):
                call(key)
        store.delete(key)
    assert store.get("folder/file") == b""


def test_put_replaces_and_create_never_does(store: ObjectStore) -> None:
    assert store.create("k", b"first", content_type="text/plain") is True
    assert store.create("k", b"second", content_type="text/html") is False
    assert store.get("k") == b"first"
    assert store.stat("k").content_type == "text/plain"
    old = store.stat("k").etag
    store.put("k", b"third!", content_type="text/css")
    assert store.get("k") == b"third!"
    assert store.stat("k").content_type == "text/css"
    assert store.stat("k").etag != old
    store.delete("k")
    assert store.create("k", b"fourth", content_type="text/plain") is True


def test_empty_objects_are_objects(store: ObjectStore) -> None:
    store.put("bytes", b"")
    store.put("stream", cast(BinaryIO, Drip(b"")))
    assert store.create("created", b"", content_type="text/plain") is True
    for key in ("bytes", "stream", "created"):
        assert store.get(key) == b""
        assert list(store.stream(key)) == []
        assert store.stat(key).bytes == 0


def test_of_fifty_racing_creators_one_wins_and_its_bytes_stand(store: ObjectStore, race: Race) -> None:
    store.put("warm", b"")
    bodies = [f"writer {number} ".encode() * 50 for number in range(50)]
    won = race(
        50, lambda n: store.create("tasks/t/1/result.json", bodies[n], content_type="application/json")
    )
    assert [type(outcome) for outcome in won] == [bool] * 50, won
    assert sum(map(bool, won)) == 1
    assert store.get("tasks/t/1/result.json") == bodies[won.index(True)]


def test_many_are_created_as_one_after_the_other(store: ObjectStore) -> None:
    store.put("tasks/t/2/r", b"kept")
    items = [(f"tasks/t/{number}/r", f"data {number}".encode()) for number in range(40)]
    items += [("tasks/t/5/r", b"later"), ("tasks/t/2/r", b"later"), ("tasks/t/41/r", b"")]
    created = store.create_many(items, content_type="text/plain")
    assert list(created) == [number not in (2, 40, 41) for number in range(43)]
    for number, (key, data) in enumerate(items):
        assert store.get(key) == (b"kept" if key == "tasks/t/2/r" else items[5][1] if number == 40 else data)
    assert store.stat("tasks/t/41/r").content_type == "text/plain"
    assert len(list(store.list())) == 41
    assert list(store.create_many([], content_type="text/plain")) == []


@_BOUNDED
def test_of_racing_creators_of_many_one_wins_each(store: ObjectStore, race: Race) -> None:
    def create(writer: int) -> object:
        return store.create_many([(f"k/{n}", b"%d" % writer) for n in range(5)], content_type="text/plain")

    store.put("warm", b"")
    won: list[Sequence[bool]] = race(6, create)  # type: ignore[assignment]
    for number in range(5):
        (winner,) = [writer for writer in range(6) if won[writer][number]]
        assert store.get(f"k/{number}") == b"%d" % winner


def test_readers_never_see_half_of_a_replaced_object(store: ObjectStore, race: Race) -> None:
    size = 200_000
    store.put("k", b"a" * size)

    def act(number: int) -> object:
        if number < 2:
            for _ in range(10):
                store.put("k", bytes([98 + number]) * size)
            return True
        seen = [store.get("k") for _ in range(10)]
        return all(len(data) == size and len(set(data)) == 1 for data in seen)

    assert race(6, act) == [True] * 6


@pytest.mark.parametrize("size", [1, 1000, 9_000_000])
def test_a_stream_may_give_less_than_is_asked_for(store: ObjectStore, size: int) -> None:
    data = os.urandom(size)
    info = store.put("k", cast(BinaryIO, Drip(data, 1 + size // 1000)), content_type="audio/wav")
    assert info.bytes == size
    assert info.content_type == "audio/wav"
    assert store.get("k") == data


def test_a_file_is_stored_from_its_path(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = os.urandom(17 << 20)
    source.write_bytes(data)
    assert store.put("k", source).bytes == len(data)
    assert b"".join(store.stream("k", chunk_bytes=100_000)) == data
    assert all(len(chunk) <= 100_000 for chunk in store.stream("k", chunk_bytes=100_000))


def test_a_missing_source_file_is_no_outage(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put("k", tmp_path / "missing")
    assert list(store.list()) == []


def test_a_stream_that_breaks_leaves_what_stood_there(store: ObjectStore) -> None:
    class Broken:
        def __init__(self) -> None:
            self.reads = 0

        def read(self, count: int) -> bytes:
            self.reads += 1
            if self.reads > 12:
                raise OSError("the client went away")
            return b"x" * min(count, 1 << 20)

    store.put("k", b"old")
    with pytest.raises(OSError, match="the client went away"):
        store.put("k", cast(BinaryIO, Broken()))
    assert store.get("k") == b"old"
    assert [info.key for info in store.list()] == ["k"]


@_BOUNDED
def test_64_mib_pass_through_in_bounded_memory(store: ObjectStore) -> None:
    size = 64 << 20
    store.put("warm", cast(BinaryIO, Pattern(9 << 20)))
    source = Pattern(size)
    tracemalloc.start()
    try:
        store.put("big", cast(BinaryIO, source))
        digest = hashlib.sha256()
        for chunk in store.stream("big"):
            digest.update(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest.digest() == source.digest.digest()
    assert peak < 40 << 20


@_BOUNDED
def test_a_stream_that_is_left_early_is_closed(store: ObjectStore) -> None:
    store.put("k", b"x" * 3_000_000)
    for _ in range(100):
        chunks = store.stream("k", chunk_bytes=1000)
        next(chunks)
        del chunks
        store.stream("k")
    assert store.get("k")


def test_listing_is_in_the_utf8_order_of_the_whole_key(store: ObjectStore, by_folder: bool) -> None:
    keys = [
        "a b/x", "a!/x", "a-b", "a.b/c", "a/b", "a/b-c", "a0", "b/c/d", "b/c.d/e", "é", "z", "中/文", "😀",
    ]  # fmt: skip

    def place(key: str) -> list[bytes]:
        return key.encode().split(b"/") if by_folder else [key.encode()]

    for key in keys:
        store.put(key, key.encode())
    expected = sorted(keys, key=place)
    assert [info.key for info in store.list()] == expected
    assert [info.bytes for info in store.list()] == [len(key.encode()) for key in expected]
    for prefix in ("a", "a/", "a/b", "b/c", "b/c/", "none", "none/at/all", "a b", "中"):
        assert [info.key for info in store.list(prefix)] == [k for k in expected if k.startswith(prefix)]
    # A folder's name skips the folder where the store keeps folders; we never begin there.
    for start in (*expected, "a.", "a/", "0", "\U0010ffff", *(() if by_folder else ("b/c",))):
        after = [k for k in expected if place(k) > place(start)]
        assert [info.key for info in store.list(start_after=start)] == after
        assert [info.key for info in store.list("a", start_after=start)] == [k for k in after if k[0] == "a"]


def test_long_listings_come_in_pages(store: ObjectStore) -> None:
    keys = [f"many/{number:05d}" for number in range(25)]
    pages = 0

    def ten(params: dict[str, object], **_: object) -> None:
        nonlocal pages
        pages += 1
        params["MaxKeys"] = 10

    if isinstance(store, S3Store):
        store._client.meta.events.register("before-parameter-build.s3.ListObjectsV2", ten)
    try:
        for key in keys:
            store.put(key, b"")
        assert [info.key for info in store.list("many/")] == keys
        assert pages in (0, 3)
        assert [info.key for info in store.list("many/", start_after="many/00009")] == keys[10:]
        assert next(store.list("many/")).key == keys[0]
    finally:
        if isinstance(store, S3Store):
            store._client.meta.events.unregister("before-parameter-build.s3.ListObjectsV2", ten)


@pytest.mark.parametrize("content_type", ["text/plain\r\nX-Evil: 1", "", "é/ö", "x" * 300])
def test_a_content_type_that_no_header_can_hold_is_replaced(store: ObjectStore, content_type: str) -> None:
    store.put("k", b"x", content_type=content_type)
    assert store.stat("k").content_type == "application/octet-stream"


def test_locations_are_urls(local_store: LocalStore, s3_store: S3Store, bucket: str, tmp_path: Path) -> None:
    assert s3_store.location("a/b.png") == f"s3://{bucket}/some/prefix/a/b.png"
    assert local_store.location("a/b c.png") == (tmp_path / "store/a/b c.png").as_uri()


def test_a_store_that_works_answers_a_ping(store: ObjectStore) -> None:
    store.ping()
    assert list(store.list()) == []


def test_the_store_is_named_by_its_url(tmp_path: Path) -> None:
    local = open_store(StorageSettings(store_url=(tmp_path / "with space").as_uri()))
    assert local.location("k") == (tmp_path / "with space/k").as_uri()
    remote = open_store(StorageSettings(store_url="s3://bucket//deep/prefix/"))
    assert remote.location("k") == "s3://bucket/deep/prefix/k"
    assert open_store(StorageSettings(store_url="s3://bucket")).location("k") == "s3://bucket/k"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://",
        "s3:///key",
        "file://relative/path",
        "file:relative",
        "gs://bucket",
        "s3://u:p@b/x",
        "/abs",
    ],
)
def test_a_url_that_names_no_store_is_an_installation_error(url: str) -> None:
    with pytest.raises(InstallationError, match="INFERQ_STORE_URL") as caught:
        open_store(StorageSettings(store_url=url))
    assert caught.value.code == "bad_store_url"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_FETCH_ALLOWED_NETWORKS", "10.0.0.0/8, ::1/128")
    monkeypatch.setenv("INFERQ_FETCH_S3_BUCKETS", "one,two")
    monkeypatch.setenv("INFERQ_STORE_FSYNC", "false")
    settings = StorageSettings.load()
    assert [str(network) for network in settings.fetch_allowed_networks] == ["10.0.0.0/8", "::1/128"]
    assert settings.fetch_s3_buckets == ("one", "two")
    assert settings.store_fsync is False
    assert settings.store_url.startswith("file:///")
    monkeypatch.setenv("INFERQ_FETCH_ALLOWED_NETWORKS", "10.0.0.1/8")
    with pytest.raises(InstallationError, match="INFERQ_FETCH_ALLOWED_NETWORKS"):
        StorageSettings.load()


def test_an_unreachable_s3_is_an_outage(bucket: str) -> None:
    store = S3Store(bucket, endpoint_url="http://127.0.0.1:9")
    for call in (store.ping, lambda: store.get("k"), lambda: list(store.list()), lambda: store.put("k", b"")):
        with pytest.raises(StoreOutage, match="INFERQ_S3_ENDPOINT_URL"):
            call()
