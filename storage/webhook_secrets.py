"""The secrets that callbacks are signed with: a JSON file that says which belong to which tenant.

A secret is `whsec_` and the base64 of 24 to 64 random bytes, as the Standard Webhooks have it. During a
rotation a tenant has two (or more) that are valid at once, and callbacks carry a signature by each.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from schemas import InferqError, InstallationError, Settings
from schemas.task import Tenant

PREFIX = "whsec_"
KEEP_SECONDS = 86400.0
"""How long the secrets of before stay valid after a rotation, unless it says otherwise."""

_BYTES = 32

_log = logging.getLogger(__name__)


class WebhookSettings(Settings):
    """Where the secrets of callbacks are."""

    webhook_secrets_file: Path = Field(
        Path(".inferq/webhook-secrets.json"),
        description="The file of the secrets that callbacks are signed with, by tenant.",
    )


class WebhookSecret(BaseModel):
    """A tenant's secret. `until`: when it stops being used; None for the current one."""

    model_config = ConfigDict(frozen=True)

    tenant: Tenant
    secret: SecretStr
    created: AwareDatetime
    until: AwareDatetime | None = None

    @property
    def secret_id(self) -> str:
        """A name for it that is no secret."""
        return hashlib.sha256(self.secret.get_secret_value().encode()).hexdigest()[:12]

    def valid(self, now: datetime) -> bool:
        return self.until is None or now < self.until


_RECORDS = TypeAdapter(tuple[WebhookSecret, ...])
_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


class WebhookSecrets:
    """The secrets in one file. Many processes may read and change it at once; a change shows at once.

    A file that is not there holds no secrets. Any method raises InstallationError for one that cannot be
    read, `of` only the first time: later it keeps to the secrets it has, and logs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._known: tuple[WebhookSecret, ...] | None = None

    def rotate(self, tenant: str, *, keep: float = KEEP_SECONDS) -> WebhookSecret:
        """Give the tenant a new secret; those of before stay valid for `keep` seconds more.

        Raises InferqError (`bad_tenant`) where the tenant's name is not one.
        """
        try:
            _TENANT.validate_python(tenant)
        except ValidationError as error:
            raise InferqError(
                f"tenant {tenant!r} is not 1 to 64 of A-Z a-z 0-9 . _ -", code="bad_tenant"
            ) from error
        now = datetime.now(UTC)
        last = now + timedelta(seconds=keep)
        text = PREFIX + base64.b64encode(secrets.token_bytes(_BYTES)).decode()
        made = WebhookSecret(tenant=tenant, secret=SecretStr(text), created=now)
        with self._changing() as records:
            for number, record in enumerate(records):
                if record.tenant == tenant and (record.until is None or record.until > last):
                    records[number] = record.model_copy(update={"until": last})
            records[:] = [record for record in records if record.valid(now)]
            records.append(made)
        return made

    def revoke(self, secret_id: str) -> WebhookSecret:
        """Take a secret away, at once. Raises InferqError (`unknown_secret`) where none has that id."""
        with self._changing() as records:
            for record in records:
                if record.secret_id == secret_id:
                    records.remove(record)
                    return record
        raise InferqError(
            f"no secret in {self._path} has the id {secret_id!r}; list them: inferq secrets list",
            code="unknown_secret",
        )

    def list(self) -> tuple[WebhookSecret, ...]:
        """Every secret, the oldest first, those that are no longer valid included."""
        return self._read()

    def of(self, tenant: str) -> tuple[str, ...]:
        """The tenant's valid secrets, the newest first."""
        now = datetime.now(UTC)
        return tuple(
            record.secret.get_secret_value()
            for record in reversed(self._current())
            if record.tenant == tenant and record.valid(now)
        )

    def _current(self) -> tuple[WebhookSecret, ...]:
        with self._lock:
            seen = self._fingerprint()
            if self._known is None or seen != self._seen:
                try:
                    self._known = self._read()
                except InstallationError as error:
                    if self._known is None:
                        raise
                    _log.error("keeping to the secrets of before: %s", error)
                self._seen = seen
            return self._known

    def _fingerprint(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[WebhookSecret, ...]:
        try:
            return _RECORDS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except ValidationError as error:
            # Its words would quote the secrets.
            places = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors()[:3])
            raise self._bad(f"it is no list of secrets ({places or 'not JSON'})") from None
        except OSError as error:
            raise self._bad(str(error)) from error

    def _bad(self, what: str) -> InstallationError:
        return InstallationError(
            f"the file of webhook secrets {self._path} cannot be read: {what}; set "
            "INFERQ_WEBHOOK_SECRETS_FILE to a readable one, or move it away and run: inferq secrets rotate",
            code="bad_secrets_file",
        )

    @contextmanager
    def _changing(self) -> Iterator[MutableSequence[WebhookSecret]]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The lock is a file of its own: the secrets' file is replaced, and a lock on it with it.
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

    def _write(self, records: Sequence[WebhookSecret]) -> None:
        content = [
            record.model_dump(mode="json", exclude_none=True) | {"secret": record.secret.get_secret_value()}
            for record in records
        ]
        try:
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    os.fchmod(handle, 0o600)
                    file.write(json.dumps(content, indent=2) + "\n")
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
            f"the file of webhook secrets {self._path} cannot be written: {error}; set "
            "INFERQ_WEBHOOK_SECRETS_FILE to one that can",
            code="bad_secrets_file",
        )
