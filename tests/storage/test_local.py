"""What only the local-folder store promises: durability, and what a bad disk does."""

from __future__ import annotations

import errno
import itertools
import multiprocessing as mp
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferq.storage import BadObjectKey, StoreOutage
from inferq.storage.objects.local import LocalStore

Race = Callable[[int, Callable[[int], object]], list[object]]


def test_making_a_store_touches_nothing(tmp_path: Path) -> None:
    LocalStore(tmp_path / "not/yet")
    assert list(tmp_path.iterdir()) == []
    assert list(LocalStore(tmp_path / "not/yet").list()) == []


def test_deleting_leaves_no_empty_folders(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b/c/one", b"")
    store.put("a/two", b"")
    store.delete("a/b/c/one")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["two"]
    store.delete("a/two")
    assert [p.name for p in tmp_path.iterdir()] == [".inferq"]


def test_writing_and_deleting_neighbours_do_not_trip_each_other(tmp_path: Path, race: Race) -> None:
    store = LocalStore(tmp_path, fsync=False)

    def act(number: int) -> object:
        for _ in range(150):
            store.put(f"deep/er/folder/{number}", b"x")
            store.delete(f"deep/er/folder/{number}")
        return True

    assert race(6, act) == [True] * 6


def test_a_killed_writer_leaves_nothing_that_shows_and_is_swept_later(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from inferq.storage.objects.local import LocalStore\n"
        "class Dies:\n"
        "    def read(self, n):\n"
        "        if not hasattr(self, 'once'):\n"
        "            self.once = 1\n"
        "            return b'x' * 100\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalStore(Path(sys.argv[1])).put('k', Dies())\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
    left = list((tmp_path / ".inferq/partial").iterdir())
    assert len(left) == 1
    assert list(LocalStore(tmp_path).list()) == []
    LocalStore(tmp_path).put("other", b"")
    assert left[0].exists(), "it may still be another process's"
    os.utime(left[0], (time.time() - 2 * 86400,) * 2)
    LocalStore(tmp_path).put("other", b"")
    assert not left[0].exists()


@pytest.mark.parametrize("act", ["put", "create"])
def test_with_fsync_file_and_folders_are_synced_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(os.path.relpath(path, tmp_path))
        real(descriptor)

    LocalStore(tmp_path).ping()
    monkeypatch.setattr(os, "fsync", fsync)
    getattr(LocalStore(tmp_path), act)("a/b/c", b"data", content_type="text/plain")
    assert synced[0].startswith(".inferq/partial/"), "the data comes before the name"
    assert set(synced[1:]) == {"a/b", "a", "."}
    synced.clear()
    getattr(LocalStore(tmp_path), act)("a/b/d", b"data", content_type="text/plain")
    assert synced[1:] == ["a/b"]
    synced.clear()
    getattr(LocalStore(tmp_path, fsync=False), act)("a/b/e", b"data", content_type="text/plain")
    assert synced == []


def test_many_are_on_the_disk_before_any_shows_and_their_names_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("t/3/r", b"kept")
    done: list[tuple[str, str]] = []  # each sync once it is done, each link before it is
    real_sync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        real_sync(descriptor)
        done.append(("sync", os.path.relpath(path, tmp_path)))

    def link(source: str, target: str) -> None:
        done.append(("link", os.path.relpath(source, tmp_path)))
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    store.create_many([(f"t/{number}/r", b"data") for number in range(9)], content_type="text/plain")
    files, links, folders = done[:9], done[9:18], done[18:]
    assert sorted(files) == sorted(("sync", path) for _, path in links)
    assert {act for act, _ in links} == {"link"}
    # Also the folder of the object that was there: another process may not have synced it yet.
    assert sorted(folders) == [("sync", f"t/{number}") for number in range(9)]
    done.clear()
    LocalStore(tmp_path, fsync=False).create_many([("t/a/r", b""), ("t/b/r", b"")], content_type="text/plain")
    assert [act for act, _ in done] == ["link", "link"]


def test_an_object_that_another_left_unsynced_is_synced_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LocalStore(tmp_path, fsync=False).put("t/1/r", b"kept")
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    assert not LocalStore(tmp_path).create("t/1/r", b"later", content_type="text/plain")
    assert synced[1:] == ["t/1"]


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("where", ["open", "write", "fsync", "fsync of a folder", "link"])
def test_a_fault_among_many_leaves_nothing_half_visible_and_a_repeat_completes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, after: int
) -> None:
    store = LocalStore(tmp_path)
    store.put("t/warm", b"data" * 1000)
    name, of_folder, calls = where.split()[0], "folder" in where, itertools.count()
    real = getattr(os, name)

    def fail(*arguments: Any, **more: Any) -> object:
        counts = name != "fsync" or stat.S_ISDIR(os.fstat(arguments[0]).st_mode) == of_folder
        if counts and next(calls) == after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **more)

    items = [(f"t/{number}/r", b"data" * 1000) for number in range(9)]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(StoreOutage, match="Input/output error"):
            store.create_many(items, content_type="text/plain")
    seen = {info.key for info in store.list("t/") if info.key != "t/warm"}
    assert {store.get(key) for key in seen} <= {b"data" * 1000}
    assert len(seen) == (9 if of_folder else after if name == "link" else 0)
    assert list((tmp_path / ".inferq/partial").iterdir()) == []
    created = store.create_many(items, content_type="text/plain")
    assert [key for (key, _), new in zip(items, created, strict=True) if not new] == sorted(seen)
    assert len(list(store.list())) == 10


def test_many_are_created_with_few_open_files(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 100, hard))
    try:
        created = store.create_many([(f"{n}/r", b"") for n in range(300)], content_type="text/plain")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(created) == [True] * 300


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("where", ["write", "open", "link", "mkdir", "fsync"])
def test_a_bad_disk_is_an_outage_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, says: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("old", b"old")

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(StoreOutage, match=says):
            store.create("new/folder/k", b"data", content_type="text/plain")
        if where in {"write", "open"}:
            with pytest.raises(StoreOutage, match=says):
                store.ping()
    assert [info.key for info in store.list()] in (["old"], ["new/folder/k", "old"][where != "fsync" :])
    assert list((tmp_path / ".inferq/partial").iterdir()) == []
    assert store.create("newer/k", b"data", content_type="text/plain")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_without_hard_links_ping_says_so_before_a_result_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", unsupported)
        for _ in range(2):
            with pytest.raises(StoreOutage, match=f"{tmp_path} .*hard links"):
                store.ping()
        with pytest.raises(StoreOutage, match="hard links"):
            store.create("k", b"data", content_type="text/plain")
    assert list(store.list()) == []
    store.ping()
    monkeypatch.setattr(os, "link", unsupported)
    store.ping()  # what has been seen to work once is not tried each time
    assert list((tmp_path / ".inferq/partial").iterdir()) == []


def unmount(folder: Path) -> Callable[[], None]:
    """Leave an empty folder there, as an unmounted disk does. Gives a function that mounts it again."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.mkdir()

    def mount() -> None:
        assert list(folder.iterdir()) == [], "nothing was written into the mount point"
        folder.rmdir()
        away.rename(folder)

    return mount


USES: dict[str, Callable[[LocalStore], object]] = {
    "get": lambda store: store.get("a/b"),
    "stat": lambda store: store.stat("a/b"),
    "stream": lambda store: store.stream("a/b"),
    "list": lambda store: list(store.list("a/")),
    "list all": lambda store: list(store.list()),
    "put": lambda store: store.put("a/new", b""),
    "put in a new folder": lambda store: store.put("new/new", b""),
    "create": lambda store: store.create("a/new", b"", content_type="text/plain"),
    "create many": lambda store: store.create_many(
        [("a/new", b""), ("b/new", b"")], content_type="text/plain"
    ),
    "delete": lambda store: store.delete("a/b"),
    "ping": lambda store: store.ping(),
}


@pytest.mark.parametrize("first", ["put", "ping", "get", "list"])
def test_a_store_that_is_not_mounted_is_an_outage_and_nothing_is_written(tmp_path: Path, first: str) -> None:
    root = tmp_path / "store"
    LocalStore(root).put("a/b", b"kept")
    store = LocalStore(root)
    USES[first](store)  # any use tells it which store it is
    mount = unmount(root)
    for name, use in USES.items():
        with pytest.raises(StoreOutage, match=f"{root} .*identity is gone.*mount its disk"):
            use(store)
            pytest.fail(name)
    mount()
    assert store.get("a/b") == b"kept"
    store.ping()


def test_another_store_in_the_same_folder_is_an_outage(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = LocalStore(root)
    store.put("a", b"")
    unmount(root)
    LocalStore(root).put("b", b"another store's")
    for use in (lambda: store.get("a"), lambda: store.put("a", b"")):
        with pytest.raises(StoreOutage, match="another store"):
            use()
    store = LocalStore(root)
    assert [info.key for info in store.list()] == ["b"]


def test_a_copy_of_a_store_is_the_same_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = LocalStore(root)
    store.put("a", b"data")
    root.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", root)
    assert store.get("a") == b"data"
    store.put("b", b"")


def test_processes_that_begin_together_agree_on_the_identity(tmp_path: Path, race: Race) -> None:
    stores = [LocalStore(tmp_path / "store", fsync=False) for _ in range(8)]
    race(8, lambda number: stores[number].ping())
    for store in stores:
        store.put("a", b"")
        store.ping()


def test_no_store_is_made_where_a_disk_of_fstab_is_not_mounted(tmp_path: Path) -> None:
    disk = tmp_path / "a disk"
    disk.mkdir()
    table = tmp_path / "fstab"
    escaped = str(disk).replace(" ", "\\040")
    table.write_text(
        f"# a comment\n\nUUID=1 / ext4 defaults 0 1\nUUID=2 {escaped} ext4 defaults 0 2\nUUID=3 none swap sw\n"
    )
    store = LocalStore(disk / "store", fstab=str(table))
    for use in USES.values():
        with pytest.raises(StoreOutage, match=f"{disk}, which is not mounted"):
            use(store)
    assert list(disk.iterdir()) == []
    LocalStore(tmp_path / "a disk of another name", fstab=str(table)).ping()
    table.write_text(f"UUID=2 {escaped} ext4 noauto,ro 0 2\n")
    store.ping()
    table.write_text(f"UUID=2 {escaped} ext4 defaults 0 2\n")
    LocalStore(disk / "store").ping()  # it has an identity


def test_a_store_that_may_not_be_created_is_not_made_in_an_empty_folder(tmp_path: Path) -> None:
    careful = LocalStore(tmp_path, create=False)
    for use in USES.values():
        with pytest.raises(StoreOutage, match="INFERQ_STORE_CREATE"):
            use(careful)
    assert list(tmp_path.iterdir()) == []
    LocalStore(tmp_path).put("a/b", b"")
    careful.ping()
    assert careful.get("a/b") == b""


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_where_folders_cannot_be_synced_files_still_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync
    files: list[int] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        files.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store = LocalStore(tmp_path)
    store.ping()
    files.clear()
    store.ping()
    store.put("a/b", b"put")
    assert store.create("a/c", b"created", content_type="text/plain")
    assert not store.create("a/c", b"again", content_type="text/plain")
    assert (store.get("a/b"), store.get("a/c")) == (b"put", b"created")
    assert len(files) == 4


def test_a_folder_that_is_not_ours_is_an_outage(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    told: mp.Queue[str] = mp.get_context("fork").Queue()

    def try_it() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # root may do everything; nobody may not
        try:
            LocalStore(tmp_path / "store").ping()
        except StoreOutage as error:
            told.put(str(error))
        else:
            told.put("it could be used")

    process = mp.get_context("fork").Process(target=try_it)
    process.start()
    try:
        assert "permission" in told.get(timeout=10)
    finally:
        process.join(60)
        tmp_path.chmod(0o700)


def test_a_root_that_is_a_file_is_an_outage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreOutage):
        LocalStore(tmp_path / "file").ping()
    with pytest.raises(StoreOutage):
        LocalStore(tmp_path / "file/below").put("k", b"")


def test_a_key_cannot_be_a_folder_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)
    store.put("a/b", b"kept")
    for key in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(BadObjectKey, match="folder"):
            store.put(key, b"")
        with pytest.raises(BadObjectKey, match="folder"):
            store.create(key, b"", content_type="text/plain")
    assert [info.key for info in store.list()] == ["a/b"]
    assert store.get("a/b") == b"kept"


def test_without_extended_attributes_only_the_type_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", unsupported)
    store = LocalStore(tmp_path)
    store.put("k.png", b"x", content_type="image/png")
    store.put("k.json", b"x", content_type="application/json")
    assert store.stat("k.png").content_type == "application/octet-stream"
    assert store.stat("k.json").content_type == "application/json"


def test_foreign_files_in_the_folder_do_not_break_a_listing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("k", b"")
    (tmp_path / "new\nline").write_text("")
    os.close(os.open(os.fsencode(tmp_path) + b"/not-utf8-\xff", os.O_CREAT))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert [info.key for info in store.list()] == ["k"]


def test_a_small_write_costs_little(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)

    def once(number: int) -> float:
        began = time.thread_time()
        assert not list(store.list(f"tasks/default/{number}/", start_after=f"tasks/default/{number}/f"))
        store.create(f"tasks/default/{number}/result.json", b"x" * 500, content_type="application/json")
        return time.thread_time() - began

    costs = sorted(once(number) for number in range(300))
    assert costs[150] < 0.001, "seconds of CPU; about 0.0001 on an idle machine"
