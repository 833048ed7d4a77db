"""The folder for the files of a worker's runs. A worker deletes what killed workers left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from inferq.schemas import InstallationError, Outage

_PREFIX = "inferq-scratch-"
_LOCK = ".lock"
_LEAST_ROOM_BYTES = 16 << 20
"""With less free, the disk counts as full. A larger input may still fit on another worker's disk."""


_START_TRIES = 10


class ScratchUnusable(Outage):
    """This machine's disk is full, or the scratch folder cannot be used: no task's fault."""

    code = "scratch_unusable"


class ScratchFolder:
    """A private folder below `parent`, held by a lock for as long as this process lives.

    `statvfs` tells how much room its disk has.
    """

    def __init__(self, parent: Path, *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> None:
        self._statvfs = statvfs
        self._held: list[int] = []
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            for _ in range(_START_TRIES):
                # Inputs may be private: only this user can enter a folder made by mkdtemp.
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                if self._hold():
                    return
        except OSError as error:
            raise InstallationError(
                f"the scratch folder {parent} cannot be used: {error.strerror}; set INFERQ_SCRATCH_DIR"
            ) from error
        raise InstallationError(
            f"the scratch folder {parent} cannot be used: what is made there is deleted at once; "
            "set INFERQ_SCRATCH_DIR"
        )

    def check(self) -> None:
        """Make the folder again if it was deleted. Raises ScratchUnusable if it cannot be used, or its disk is full."""
        try:
            if not self._is_held():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    self.path.mkdir(mode=0o700)
                self._check_owner()
                if not self._hold():
                    raise FileNotFoundError(errno.ENOENT, "another process deletes it")
            disk = self._statvfs(self.path)
        except OSError as error:
            raise ScratchUnusable(
                f"the scratch folder {self.path} cannot be used: {error.strerror}; repair it or set "
                "INFERQ_SCRATCH_DIR"
            ) from error
        if disk.f_bavail * disk.f_frsize < _LEAST_ROOM_BYTES or (disk.f_files > 0 and disk.f_favail == 0):
            raise ScratchUnusable(
                f"the disk of {self.path} is full: free some space or set INFERQ_SCRATCH_DIR"
            )

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _hold(self) -> bool:
        """Lock the folder; False if another worker's sweep deleted it before that."""
        self._release()
        try:
            self._held.append(os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            fcntl.flock(self._held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_held():
                return False
            # systemd-tmpfiles spares a folder that is locked, and everything in it.
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._held.append(folder)
            with suppress(OSError):  # some network file systems cannot
                fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        return True

    def _check_owner(self) -> None:
        # In a folder such as /tmp, another user could have made it meanwhile, to read the inputs.
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "it is not this user's private folder")

    def _is_held(self) -> bool:
        """Whether the locked file is still the one in the folder."""
        if not self._held:
            return False
        try:
            there = (self.path / _LOCK).stat()
        except FileNotFoundError:
            return False
        mine = os.fstat(self._held[0])
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.geteuid():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
