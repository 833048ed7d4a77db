"""A short list of records in a JSON file that only its owner may read: keys, secrets.

Many processes may read and change it at the same time. A change is made under a lock, completely or not at all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from inferq.schemas import InstallationError

R = TypeVar("R", bound=BaseModel)

_log = logging.getLogger(__name__)


class JsonFile(Generic[R]):
    """The records of type `kind` in the file at `path`; a missing file holds none.

    `what` names the file in messages, `setting` the variable with its path. Any method raises InstallationError
    with `code` if the file cannot be used. `dump` turns a record into JSON.
    """

    def __init__(
        self,
        path: Path,
        kind: type[R],
        *,
        what: str,
        setting: str,
        code: str,
        dump: Callable[[R], dict[str, Any]],
    ) -> None:
        self.path = path
        self._records: TypeAdapter[tuple[R, ...]] = TypeAdapter(tuple[kind, ...])  # type: ignore[valid-type]
        self._what = what
        self._setting = setting
        self._code = code
        self._dump = dump
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._known: tuple[R, ...] | None = None

    def read(self) -> tuple[R, ...]:
        """Every record, oldest first."""
        try:
            return self._records.validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return ()
        except ValidationError as error:
            # pydantic's own message would quote values, which may be secret.
            places = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors()[:3])
            raise self._unreadable(f"it is not a list of records ({places or 'not JSON'})") from None
        except OSError as error:
            raise self._unreadable(str(error)) from error

    def current(self) -> tuple[R, ...]:
        """As `read`, but the file is read again only after it changed.

        If it becomes unreadable, this logs and keeps the earlier records. While nothing changes it returns the
        same tuple.
        """
        with self._lock:
            seen = self._fingerprint()
            if self._known is None or seen != self._seen:
                try:
                    self._known = self.read()
                except InstallationError as error:
                    if self._known is None:
                        raise
                    _log.error("keeping the earlier records: %s", error)
                self._seen = seen
            return self._known

    @contextmanager
    def changing(self) -> Iterator[MutableSequence[R]]:
        """The records, to be changed in place. They are written if the block ends without an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A separate lock file: the records' file is replaced, and a lock on it would go with it.
            lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
            self._give(lock)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = list(self.read())
            before = tuple(records)
            yield records
            if tuple(records) != before:
                self._write(records)
        finally:
            os.close(lock)

    def _fingerprint(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _give(self, handle: int) -> None:
        """Give a file to the owner of the records or of their folder: root may have made it for another user."""
        if os.geteuid() == 0:
            owner = (self.path if self.path.exists() else self.path.parent).stat()
            os.fchown(handle, owner.st_uid, owner.st_gid)

    def _write(self, records: Sequence[R]) -> None:
        text = json.dumps([self._dump(record) for record in records], indent=2) + "\n"
        try:
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    os.fchmod(handle, 0o600)
                    self._give(handle)
                    file.write(text)
                    file.flush()
                    os.fsync(handle)
                Path(temporary).replace(self.path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._unwritable(error) from error

    def _unreadable(self, why: str) -> InstallationError:
        return InstallationError(
            f"{self._what} {self.path} cannot be read: {why}; set {self._setting} to a readable one, or move "
            "it away and make a new one",
            code=self._code,
        )

    def _unwritable(self, error: OSError) -> InstallationError:
        return InstallationError(
            f"{self._what} {self.path} cannot be written: {error}; set {self._setting} to one that can",
            code=self._code,
        )
