"""The API keys: a JSON file that says which key belongs to which tenant."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError

from schemas import InferqError, InstallationError
from schemas.task import Tenant

_PREFIX = "iq_"
_KEY_BYTES = 32
_KEY_ID_LENGTH = 12

_log = logging.getLogger(__name__)


class KeyRecord(BaseModel):
    """What is kept of a key: never the key itself. `key_id` is the start of its digest and no secret."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    tenant: Tenant
    name: str = ""
    created: AwareDatetime

    @property
    def key_id(self) -> str:
        return self.sha256[:_KEY_ID_LENGTH]


_RECORDS = TypeAdapter(tuple[KeyRecord, ...])
_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


class KeyFile:
    """The keys in one file. Many processes may read and change it at once; a change shows at once.

    A file that is not there holds no keys. Any method raises InstallationError for one that cannot be
    read, `tenant_of` only the first time: later it keeps to the keys it has, and logs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._by_id: dict[str, KeyRecord] | None = None

    def add(self, tenant: str, *, name: str = "") -> str:
        """Make a key for `tenant`. The answer is the only place where the key itself ever stands.

        Raises InferqError (`bad_tenant`) where the tenant's name is not one.
        """
        try:
            _TENANT.validate_python(tenant)
        except ValidationError as error:
            raise InferqError(
                f"tenant {tenant!r} is not 1 to 64 of A-Z a-z 0-9 . _ -", code="bad_tenant"
            ) from error
        key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        record = KeyRecord(sha256=_digest(key), tenant=tenant, name=name, created=datetime.now(UTC))
        with self._changing() as records:
            records.append(record)
        return key

    def remove(self, key_id: str) -> KeyRecord:
        """Take a key away. Raises InferqError (`unknown_key`) where no key has that id."""
        with self._changing() as records:
            for record in records:
                if record.key_id == key_id:
                    records.remove(record)
                    return record
        raise InferqError(f"no key in {self._path} has the id {key_id!r}", code="unknown_key")

    def list(self) -> tuple[KeyRecord, ...]:
        """Every key's record, the oldest first."""
        return self._read()

    def tenant_of(self, key: str) -> str | None:
        """Whose key that is; None where it is nobody's."""
        digest = _digest(key)
        record = self._current().get(digest[:_KEY_ID_LENGTH])
        if record is None or not hmac.compare_digest(record.sha256, digest):
            return None
        return record.tenant

    def _current(self) -> dict[str, KeyRecord]:
        with self._lock:
            seen = self._fingerprint()
            if self._by_id is None or seen != self._seen:
                try:
                    self._by_id = {record.key_id: record for record in self._read()}
                except InstallationError as error:
                    if self._by_id is None:
                        raise
                    _log.error("keeping to the keys of before: %s", error)
                self._seen = seen
            return self._by_id

    def _fingerprint(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[KeyRecord, ...]:
        try:
            return _RECORDS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            raise InstallationError(
                f"the key file {self._path} cannot be read: {error}; set INFERQ_API_KEYS_FILE to a readable"
                " one, or move it away and add the keys again",
                code="bad_key_file",
            ) from error

    @contextmanager
    def _changing(self) -> Iterator[MutableSequence[KeyRecord]]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The lock is a file of its own: the key file is replaced, and a lock on it with it.
            lock = os.open(self._path.with_name(self._path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = list(self._read())
            before = tuple(records)
            yield records
            if tuple(records) != before:
                self._write(records)
        finally:
            os.close(lock)

    def _write(self, records: Sequence[KeyRecord]) -> None:
        text = json.dumps([record.model_dump(mode="json") for record in records], indent=2) + "\n"
        try:
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    os.fchmod(handle, 0o600)
                    file.write(text)
                    file.flush()
                    os.fsync(handle)
                Path(temporary).replace(self._path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InstallationError:
        return InstallationError(
            f"the key file {self._path} cannot be written: {error}; set INFERQ_API_KEYS_FILE to one that can",
            code="bad_key_file",
        )


def _digest(key: str) -> str:
    # Slow hashes (bcrypt, Argon2) make up for secrets that can be guessed. A key here has 256 random bits,
    # so there is nothing to guess from its digest however fast the hash is, and each request pays for it.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
