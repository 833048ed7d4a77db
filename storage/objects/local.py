"""The object store in a local folder, or on a network file system that workers share."""

# Paths are strings here: a Path costs more than the file operation itself.
# ruff: noqa: PTH100, PTH102, PTH103, PTH106, PTH108, PTH112, PTH116, PTH120, PTH123

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from inferq.storage.objects.store import (
    CHUNK_BYTES,
    DEFAULT_TYPE,
    RESERVED_FOLDER,
    BadObjectKey,
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    Pieces,
    StoreOutage,
    check_key,
    check_prefix,
    clean_type,
    side_by_side,
)

T = TypeVar("T")

_TYPE_ATTRIBUTE = "user.inferq.content_type"
_STALE_SECONDS = 86400.0
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.EPERM, errno.E2BIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
_PLACE_TRIES = 500  # each takes microseconds
_MOST_OPEN = 64
"""The most files of one call that are open at once."""
_SYNC_THREADS = 4
"""Each sync flushes the disk's cache; the kernel merges flushes that are requested at the same time."""


class LocalStore(ObjectStore):
    """Objects as files below `root`, each under its key.

    A write goes to a temporary file on the same file system and is then moved into place. With `fsync`, the file
    and its folder's entry are on the disk before the call returns. A content type that the key does not imply is
    kept in an extended attribute; on a file system without those it is lost.

    The folder has an identity, a file that the first write creates, if it may `create` a store. Where a disk is not
    mounted, the folder is there and empty. So before each write, and before it calls an object absent, the store
    checks that the identity is the one it began with. A folder without it is an outage, and nothing is written.
    """

    def __init__(
        self, root: Path, *, fsync: bool = True, create: bool = True, fstab: str = "/etc/fstab"
    ) -> None:
        self._root = os.path.abspath(root)
        self._base = self._root.rstrip("/") + "/"
        self._own = self._base + RESERVED_FOLDER
        self._scratch = self._own + "/partial"
        self._identity_path = self._own + "/identity"
        self._identity: bytes | None = None
        self._identity_file: tuple[int, int] | None = None
        self._identifying = threading.Lock()
        self._may_create = create
        self._fstab = fstab
        self._fsync = fsync
        self._serial = count()
        self._token = secrets.token_hex(6)
        self._swept = False
        self._linked = False

    def put(
        self,
        key: str,
        data: bytes | BinaryIO | Path,
        *,
        content_type: str = DEFAULT_TYPE,
    ) -> ObjectInfo:
        path = self._base + check_key(key)
        self._check_identity(writing=True)
        if isinstance(data, Path):
            with data.open("rb", buffering=0) as source:
                return self._put(key, path, source, content_type)
        return self._put(key, path, data, content_type)

    def _put(self, key: str, path: str, data: bytes | BinaryIO, content_type: str) -> ObjectInfo:
        content_type = clean_type(content_type)
        with self._temporaries([(key, data)], content_type) as (temporary,):
            try:
                info = _info(key, os.stat(temporary), content_type)
            except OSError as error:
                raise self._outage(error) from error
            self._place(key, os.replace, temporary, path)
        return info

    def create(self, key: str, data: bytes, *, content_type: str) -> bool:
        return self._create([(key, data)], clean_type(content_type))[0]

    def create_many(self, items: Sequence[tuple[str, bytes]], *, content_type: str) -> Sequence[bool]:
        for key, _ in items:
            check_key(key)
        created: list[bool] = []
        for start in range(0, len(items), _MOST_OPEN):
            created += self._create(items[start : start + _MOST_OPEN], clean_type(content_type))
        return created

    def _create(self, items: Sequence[tuple[str, bytes]], content_type: str) -> Sequence[bool]:
        paths = [self._base + check_key(key) for key, _ in items]
        self._check_identity(writing=True)
        for path in paths:
            # Usually the key is the first in its folder. A folder made before the file is synced is in the file
            # system's journal before the file, so its own entry needs no sync.
            with suppress(OSError):
                os.mkdir(os.path.dirname(path))
        created: list[bool] = []
        changed: list[str] = []
        with self._temporaries(items, content_type) as temporaries:
            for (key, _), temporary, path in zip(items, temporaries, paths, strict=True):
                try:
                    changed += self._move(key, self._link, temporary, path)
                    created.append(True)
                except FileExistsError:
                    # Its creator may not have synced it yet, or may have failed to.
                    changed.append(os.path.dirname(path))
                    created.append(False)
            self._sync_folders(changed)
        return created

    def get(self, key: str) -> bytes:
        with self._reading(key):
            with open(self._base + check_key(key), "rb", buffering=0) as file:
                return file.read()

    def stream(self, key: str, *, chunk_bytes: int = CHUNK_BYTES, start: int = 0) -> Pieces:
        chunks = self._chunks(key, self._base + check_key(key), chunk_bytes, start)
        next(chunks)  # opens the file, so that the call itself raises ObjectNotFound
        return chunks

    def _chunks(self, key: str, path: str, chunk_bytes: int, start: int) -> Pieces:
        with self._reading(key), open(path, "rb", buffering=0) as file:
            file.seek(start)
            yield b""
            while chunk := file.read(chunk_bytes):
                yield chunk

    def stat(self, key: str) -> ObjectInfo:
        path = self._base + check_key(key)
        with self._reading(key):
            found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise _not_found(key)
        content_type = _implied_type(key)
        with suppress(OSError):
            content_type = os.getxattr(path, _TYPE_ATTRIBUTE).decode()
        return _info(key, found, content_type)

    def list(
        self, prefix: str = "", *, start_after: str = "", limit: int | None = None
    ) -> Iterator[ObjectInfo]:
        folder, slash, _ = check_prefix(prefix).rpartition("/")
        return islice(self._walk(folder + slash, prefix, start_after), limit)

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        names: list[str] = []
        self._learn_identity()
        try:
            with os.scandir(self._base + folder) as entries:
                for entry in entries:
                    is_folder = entry.is_dir()
                    # A folder sorts by the prefix of its keys, including the slash.
                    name = entry.name + "/" if is_folder else entry.name
                    key = folder + name
                    if not (key.startswith(prefix) or (is_folder and prefix.startswith(key))):
                        continue
                    if key > start_after or (is_folder and start_after.startswith(key)):
                        names.append(name)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise self._outage(error) from error
        if not names:
            self._check_identity()
        for name in sorted(names):
            key = folder + name
            if name.endswith("/"):
                if key != RESERVED_FOLDER + "/":
                    yield from self._walk(key, prefix, start_after)
                continue
            try:
                yield _info(check_key(key), os.stat(self._base + key), "")
            except BadObjectKey:
                continue
            except OSError:
                self._check_identity()  # then it was deleted meanwhile

    def delete(self, key: str) -> None:
        path = self._base + check_key(key)
        try:
            os.unlink(path)
        except OSError as error:
            if error.errno in _ABSENT:
                self._check_identity()
                return
            raise self._outage(error) from error
        with suppress(OSError):
            folder = os.path.dirname(path)
            while len(folder) > len(self._root):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def location(self, key: str) -> str:
        return Path(self._base + check_key(key)).as_uri()

    def ping(self) -> None:
        self._check_identity(writing=True)
        with self._temporaries([("ping", b"inferq")], "") as (temporary,):
            if self._linked:
                return
            # Checked once: without it, the first result would show that `create` fails here.
            link = temporary + "-link"
            try:
                self._place("ping", self._link, temporary, link)
            finally:
                with suppress(OSError):
                    os.unlink(link)
            self._linked = True

    def _check_identity(self, *, writing: bool = False) -> None:
        """Raises StoreOutage unless the folder holds the store that this process began with.

        With `writing`, a new folder becomes a store.
        """
        found = self._stat_identity()
        if found is not None and found == self._identity_file:
            return
        with self._identifying:
            found = self._stat_identity()
            if found is None and self._identity is None:
                if not self._may_create:
                    raise self._unmounted("it has no identity, and INFERQ_STORE_CREATE is false")
                if (point := _unmounted_point(self._root, self._fstab)) is not None:
                    raise self._unmounted(
                        f"{self._fstab} names {point}, which is not mounted, and it has no identity"
                    )
                if writing:
                    self._identify()
                return
            identity = None if found is None else self._read_identity()
            if self._identity is not None and identity != self._identity:
                raise self._unmounted("its identity is gone" if identity is None else "it is another store")
            self._identity, self._identity_file = identity, found

    def _learn_identity(self) -> None:
        """Before the first read: a store that is read now may be unmounted before the first write."""
        if self._identity_file is None:
            self._check_identity()

    def _stat_identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._identity_path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise self._outage(error) from error
        return found.st_dev, found.st_ino

    def _read_identity(self) -> bytes | None:
        try:
            with open(self._identity_path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise self._outage(error) from error

    def _identify(self) -> None:
        with self._temporaries([("identity", secrets.token_hex(16).encode())], "") as (temporary,):
            with suppress(FileExistsError):  # another process was faster: its identity counts
                self._place("identity", self._link, temporary, self._identity_path)
        self._identity, self._identity_file = self._read_identity(), self._stat_identity()

    def _unmounted(self, why: str) -> StoreOutage:
        return StoreOutage(
            f"the local store {self._root} cannot be used: {why} ({RESERVED_FOLDER}/identity); mount its disk; "
            "if the folder was emptied or replaced on purpose, restart every part of inferq"
        )

    @contextmanager
    def _temporaries(
        self, items: Sequence[tuple[str, bytes | BinaryIO]], content_type: str
    ) -> Iterator[Sequence[str]]:
        """A temporary file, beside the objects, for the data of each key; deleted when the block ends.

        With `fsync` they are on the disk before the block begins.
        """
        temporaries: list[str] = []
        descriptors: list[int] = []
        try:
            try:
                for key, data in items:
                    temporary = f"{self._scratch}/{self._token}-{os.getpid()}-{next(self._serial)}"
                    descriptors.append(self._open(temporary))
                    temporaries.append(temporary)
                    chunks = [data] if isinstance(data, bytes) else iter(partial(data.read, CHUNK_BYTES), b"")
                    for chunk in chunks:  # an error of reading is the caller's, an error of writing an outage
                        self._write(descriptors[-1], chunk)
                    if content_type and content_type != _implied_type(key):
                        self._keep_type(descriptors[-1], content_type)
                if self._fsync:
                    self._sync_files(descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            yield temporaries
        finally:
            for temporary in temporaries:
                with suppress(OSError):
                    os.unlink(temporary)

    def _open(self, temporary: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            if not self._swept:
                self._sweep()
            return os.open(temporary, flags, 0o666)
        except OSError as error:
            self._swept = False
            raise self._outage(error) from error

    def _sweep(self) -> None:
        """Create the folder of temporary files, and delete old files of killed processes."""
        os.makedirs(self._scratch, exist_ok=True)
        limit = time.time() - _STALE_SECONDS
        with os.scandir(self._scratch) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < limit:
                        os.unlink(entry.path)
        self._swept = True

    def _write(self, descriptor: int, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError as error:
            raise self._outage(error) from error

    def _keep_type(self, descriptor: int, content_type: str) -> None:
        try:
            os.setxattr(descriptor, _TYPE_ATTRIBUTE, content_type.encode())
        except OSError as error:
            if error.errno not in _NO_ATTRIBUTES:
                raise self._outage(error) from error

    def _sync_files(self, descriptors: Sequence[int]) -> None:
        try:
            if len(descriptors) > 1:
                # Starts to write all of them, so that they share the first sync's commit of the journal.
                for descriptor in descriptors:
                    with suppress(OSError):  # only a hint
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._for_each(os.fsync, descriptors)
        except OSError as error:
            raise self._outage(error) from error

    def _sync_folders(self, folders: Iterable[str]) -> None:
        if not self._fsync:
            return
        try:
            self._for_each(_sync_folder, list(dict.fromkeys(folders)))
        except OSError as error:
            raise self._outage(error) from error

    def _for_each(self, sync: Callable[[T], None], things: Sequence[T]) -> None:
        if len(things) < _SYNC_THREADS:
            for thing in things:
                sync(thing)
            return

        def some(first: int) -> None:
            for thing in things[first::_SYNC_THREADS]:
                sync(thing)

        side_by_side(self._threads, [partial(some, first) for first in range(_SYNC_THREADS)])

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="local store")

    def _place(self, key: str, move: Callable[[str, str], None], temporary: str, path: str) -> None:
        """Move a temporary file into place. Raises FileExistsError if `move` does."""
        self._sync_folders(self._move(key, move, temporary, path))

    def _move(self, key: str, move: Callable[[str, str], None], temporary: str, path: str) -> Sequence[str]:
        """Move a temporary file into place; return the folders to sync. Raises FileExistsError if `move` does."""
        folder = os.path.dirname(path)
        changed = [folder]
        try:
            for _ in range(_PLACE_TRIES):
                try:
                    move(temporary, path)
                    return changed
                except FileNotFoundError:
                    if path != self._identity_path:
                        self._check_identity()
                    changed += self._make_folder(folder)  # may repeat: delete() removes empty folders
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            if isinstance(error, FileExistsError) and error.filename == temporary and not os.path.isdir(path):
                raise
            raise BadObjectKey(
                f"object key {key!r} is a folder of other keys, or lies below a key"
            ) from error
        except OSError as error:
            raise self._outage(error) from error
        raise StoreOutage(f"the local store cannot write {path}: its folder keeps disappearing")

    def _link(self, temporary: str, path: str) -> None:
        # A rename without replacing is no substitute: SMB, for example, checks that only on the client.
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StoreOutage(
                f"the local store {self._root} cannot be used: its file system has no hard links "
                f"({error.strerror}), and without them results could overwrite each other; "
                "set INFERQ_STORE_URL to a folder on a file system with hard links, or to S3"
            ) from error

    def _make_folder(self, folder: str) -> Sequence[str]:
        """Create a folder; return the folders that got a new entry."""
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for new in reversed(missing):
            try:
                os.mkdir(new)
            except FileNotFoundError:
                break
            except FileExistsError:
                with suppress(FileNotFoundError):  # created and removed by others meanwhile
                    if not stat.S_ISDIR(os.stat(new).st_mode):
                        raise
        return [os.path.dirname(new) for new in missing]

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        self._learn_identity()
        try:
            yield
        except OSError as error:
            if error.errno in _ABSENT:
                self._check_identity()
                raise _not_found(key) from error
            raise self._outage(error) from error

    def _outage(self, error: OSError) -> StoreOutage:
        what = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space or raise it",
            errno.EACCES: "permission is denied: give this user the right to read and write there",
            errno.EPERM: "permission is denied: give this user the right to read and write there",
            errno.EROFS: "the file system is mounted read-only",
        }.get(error.errno or 0, error.strerror or str(error))
        return StoreOutage(f"the local store {self._root} cannot be used: {what}")


def _unmounted_point(path: str, fstab: str) -> str | None:
    """The mount point at or above `path` that fstab(5) lists and that is not mounted."""
    path = os.path.realpath(path)
    try:
        with open(fstab, encoding="utf-8", errors="surrogateescape") as file:
            entries = [line.split() for line in file if not line.lstrip().startswith("#")]
    except OSError:
        return None
    for _, point, *more in (entry for entry in entries if len(entry) > 1):
        point = point.replace("\\040", " ").rstrip("/")
        optional = len(more) > 1 and "noauto" in more[1].split(",")
        if point and not optional and f"{path}/".startswith(f"{point}/") and not os.path.ismount(point):
            return point
    return None


def _not_found(key: str) -> ObjectNotFound:
    return ObjectNotFound(f"there is no object {key!r}")


def _sync_folder(folder: str) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # whatever was in it has been deleted since
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # then the file system looks after its folders itself
            raise
    finally:
        os.close(descriptor)


def _implied_type(key: str) -> str:
    # Only what every record of ours has, so that the common write needs no attribute.
    return "application/json" if key.endswith(".json") else DEFAULT_TYPE


def _info(key: str, found: os.stat_result, content_type: str) -> ObjectInfo:
    return ObjectInfo(
        key=key,
        bytes=found.st_size,
        content_type=content_type,
        modified=datetime.fromtimestamp(found.st_mtime, UTC),
        etag=f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}",
    )
