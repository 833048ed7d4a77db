"""Stamps: which files of the cache were verified, so that a start need not read gigabytes again.

A stamp says that a file had a SHA-256, and which file that was: its inode, size, and times of the last change to its
content (`mtime`) and to its inode (`ctime`). A file with the same figures is taken for unchanged. No program can set
`ctime`, so that a change shows even where `mtime` was set back. A stamp that fits no file, or that cannot be read, is
ignored: the file is then read, as without stamps.

What a stamp does not notice: a disk that returns other bytes than were written to it, and who can write to the disk
beneath its file system or set the machine's clock, which takes root. `inferq weights verify` reads all files.

Stamps lie in `<cache>/.verified-UID/`, a folder with mode 0700. It counts only while it belongs to this user and
nobody else can enter it, so that only this user makes stamps. A signature would add nothing: its key would have to lie
in such a folder. Unlike a key in the home folder, it stays with a cache on a volume that containers share.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_SETTLED_SECONDS = 0.1
"""A file that changed so recently gets no stamp: another change may get the same time, whose steps are up to 10 ms."""

_MOST_BYTES = 16 * 1024 * 1024

Figures = tuple[int, int, int, int]


def figures(status: os.stat_result) -> Figures:
    """What tells a file from another one, and from itself before a change."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Stamps:
    """The stamps of one version of named weights."""

    def __init__(self, cache: Path, name: str, version: str) -> None:
        self._folder = cache / f".verified-{os.geteuid()}"
        self._file = f"{name}@{version}.json"  # neither part can have an @ or a /

    def load(self) -> Mapping[str, tuple[str, Figures]]:
        """The SHA-256 and the figures of each verified file, by its path within the version; empty if none counts."""
        with suppress(OSError, ValueError, TypeError), self._open() as folder:
            handle = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with os.fdopen(handle, encoding="utf-8") as file:
                found = json.loads(file.read(_MOST_BYTES))
            return {path: (sha256, tuple(known)) for path, (sha256, known) in found.items()}
        return {}

    def save(self, verified: Mapping[str, tuple[str, Figures]]) -> None:
        """Replace the stamps. A cache that this process cannot write to gets none."""
        settled = time.time_ns() - int(_SETTLED_SECONDS * 1e9)
        kept = {path: entry for path, entry in verified.items() if entry[1][3] < settled}
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with self._open() as folder:
                made = f"{self._file}.{os.getpid()}"
                handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=folder)
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(kept, file)
                os.replace(made, self._file, src_dir_fd=folder, dst_dir_fd=folder)

    def forget(self) -> None:
        """Remove the stamps."""
        with suppress(OSError), self._open() as folder:
            os.unlink(self._file, dir_fd=folder)

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The folder as a descriptor. Raises PermissionError unless it is this user's alone."""
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            status = os.fstat(handle)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise PermissionError(f"{self._folder} is not private")
            yield handle
        finally:
            os.close(handle)
