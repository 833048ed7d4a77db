"""API keys: a JSON file of keys and their tenants."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, TypeAdapter, ValidationError

from inferq.schemas import InferqError, Record
from inferq.schemas.task import Tenant
from inferq.storage.json_file import JsonFile

_PREFIX = "iq_"
_KEY_BYTES = 32
_KEY_ID_LENGTH = 12


class KeyRecord(Record):
    """The record of a key, without the key itself. `key_id` is the start of its digest and not secret."""

    sha256: str
    tenant: Tenant
    name: str = ""
    created: AwareDatetime

    @property
    def key_id(self) -> str:
        return self.sha256[:_KEY_ID_LENGTH]


_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


class KeyFile:
    """The keys in one file. Several processes may read and change it at once; changes apply at once.

    A file that does not exist holds no keys. Every method raises InstallationError if the file cannot be read;
    `find` and `tenant_of` raise it only the first time, and later log it and go on with the keys they have.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonFile(
            path,
            KeyRecord,
            what="the key file",
            setting="INFERQ_API_KEYS_FILE",
            code="bad_key_file",
            dump=lambda record: record.model_dump(mode="json"),
        )
        self._by_id: tuple[tuple[KeyRecord, ...], Mapping[str, KeyRecord]] = (), {}

    def add(self, tenant: str, *, name: str = "") -> str:
        """Make a key for `tenant` and return it. It is stored nowhere.

        Raises InferqError (`bad_tenant`) if the tenant's name is invalid.
        """
        try:
            _TENANT.validate_python(tenant)
        except ValidationError as error:
            raise InferqError(
                f"tenant {tenant!r} is invalid; use 1 to 64 of A-Z a-z 0-9 . _ -", code="bad_tenant"
            ) from error
        key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        record = KeyRecord(sha256=_digest(key), tenant=tenant, name=name, created=datetime.now(UTC))
        with self._file.changing() as records:
            records.append(record)
        return key

    def remove(self, key_id: str) -> KeyRecord:
        """Remove a key. Raises InferqError (`unknown_key`) if no key has that id."""
        with self._file.changing() as records:
            for record in records:
                if record.key_id == key_id:
                    records.remove(record)
                    return record
        raise InferqError(f"no key in {self._file.path} has the id {key_id!r}", code="unknown_key")

    def list(self) -> tuple[KeyRecord, ...]:
        """Every key's record, oldest first."""
        return self._file.read()

    def find(self, key: str) -> KeyRecord | None:
        """The key's record; None if the key is unknown."""
        digest = _digest(key)
        record = self._records_by_id().get(digest[:_KEY_ID_LENGTH])
        return record if record is not None and hmac.compare_digest(record.sha256, digest) else None

    def tenant_of(self, key: str) -> str | None:
        """The key's tenant; None if the key is unknown."""
        record = self.find(key)
        return None if record is None else record.tenant

    def _records_by_id(self) -> Mapping[str, KeyRecord]:
        records = self._file.current()
        known, by_id = self._by_id
        if known is not records:
            by_id = {record.key_id: record for record in records}
            self._by_id = records, by_id
        return by_id


def _digest(key: str) -> str:
    # Slow hashes (bcrypt, Argon2) protect secrets that can be guessed. A key has 256 random bits and cannot be
    # guessed from its digest; a slow hash would only slow down every request.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
