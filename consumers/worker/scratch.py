"""The folder for the files of a worker's runs. A worker deletes what killed workers left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from inferq.schemas import InstallationError, Outage

_PREFIX = "inferq-scratch-"
_LOCK = ".lock"
_LEAST_ROOM_BYTES = 16 << 20
"""With less free, the disk counts as full. A larger input may still fit on another worker's disk."""


class ScratchFull(Outage):
    """This machine's disk is full: no task's fault."""

    code = "scratch_full"


class ScratchFolder:
    """A private folder below `parent`, held by a lock for as long as this process lives.

    `statvfs` tells how much room its disk has.
    """

    def __init__(self, parent: Path, *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> None:
        self._statvfs = statvfs
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            # Inputs may be private: only this user can enter a folder made by mkdtemp.
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InstallationError(
                f"the scratch folder {parent} cannot be used: {error.strerror}; set INFERQ_SCRATCH_DIR"
            ) from error

    def check_room(self) -> None:
        """Raises ScratchFull if the disk is full."""
        disk = self._statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < _LEAST_ROOM_BYTES or (disk.f_files > 0 and disk.f_favail == 0):
            raise ScratchFull(f"the disk of {self.path} is full: free some space or set INFERQ_SCRATCH_DIR")

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.geteuid():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
