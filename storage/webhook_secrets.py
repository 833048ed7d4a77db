"""The secrets that callbacks are signed with, by tenant, in a JSON file.

A secret is `whsec_` and the base64 of 24 to 64 random bytes, as in Standard Webhooks. During a rotation a tenant
has two or more valid secrets, and callbacks carry a signature by each.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import (
    AwareDatetime,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from inferq.schemas import InferqError, Record, Settings
from inferq.schemas.task import Tenant
from inferq.storage.json_file import JsonFile

PREFIX = "whsec_"
KEEP_SECONDS = 86400.0
"""Seconds that earlier secrets stay valid after a rotation, by default."""

_BYTES = 32


class WebhookSettings(Settings):
    """The settings of the secrets of callbacks."""

    webhook_secrets_file: Path = Field(
        Path(".inferq/webhook-secrets.json"),
        description="The file of the secrets that sign callbacks, by tenant.",
    )


class WebhookSecret(Record):
    """A tenant's secret. `until`: when it becomes invalid; None for the current one."""

    tenant: Tenant
    secret: SecretStr
    created: AwareDatetime
    until: AwareDatetime | None = None

    @field_validator("secret")
    @classmethod
    def _signs(cls, secret: SecretStr) -> SecretStr:
        text = secret.get_secret_value()
        try:
            usable = text.startswith(PREFIX) and base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError):
            usable = b""
        if not usable:
            raise ValueError("a secret is whsec_ and base64")
        return secret

    @property
    def secret_id(self) -> str:
        """Identifies it without revealing it."""
        return hashlib.sha256(self.secret.get_secret_value().encode()).hexdigest()[:12]

    def valid(self, now: datetime) -> bool:
        return self.until is None or now < self.until


_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


class WebhookSecrets:
    """The secrets in one file. Many processes may read and change it at the same time.

    A missing file holds no secrets. Any method raises InstallationError if it cannot be read; `of` only the
    first time: later it logs and keeps the secrets that it has.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonFile(
            path,
            WebhookSecret,
            what="the file of webhook secrets",
            setting="INFERQ_WEBHOOK_SECRETS_FILE",
            code="bad_secrets_file",
            dump=_dump,
        )

    def rotate(self, tenant: str, *, keep: float = KEEP_SECONDS) -> WebhookSecret:
        """Give the tenant a new secret; earlier ones stay valid for `keep` seconds more.

        Raises InferqError for an invalid tenant name (`bad_tenant`) or a `keep` beyond all dates (`bad_keep`).
        """
        try:
            _TENANT.validate_python(tenant)
        except ValidationError as error:
            raise InferqError(
                f"tenant {tenant!r} is not 1 to 64 of A-Z a-z 0-9 . _ -", code="bad_tenant"
            ) from error
        now = datetime.now(UTC)
        try:
            last = now + timedelta(seconds=keep)
        except (OverflowError, ValueError) as error:
            raise InferqError(
                f"secrets cannot be kept for {keep} seconds: give a number that ends before the year 10000",
                code="bad_keep",
            ) from error
        text = PREFIX + base64.b64encode(secrets.token_bytes(_BYTES)).decode()
        made = WebhookSecret(tenant=tenant, secret=SecretStr(text), created=now)
        with self._file.changing() as records:
            for number, record in enumerate(records):
                if record.tenant == tenant and (record.until is None or record.until > last):
                    records[number] = record.model_copy(update={"until": last})
            records[:] = [record for record in records if record.valid(now)]
            records.append(made)
        return made

    def revoke(self, secret_id: str) -> WebhookSecret:
        """Remove a secret at once. Raises InferqError (`unknown_secret`) if none has that id."""
        with self._file.changing() as records:
            for record in records:
                if record.secret_id == secret_id:
                    records.remove(record)
                    return record
        raise InferqError(
            f"no secret in {self._file.path} has the id {secret_id!r}; list them: inferq secrets list",
            code="unknown_secret",
        )

    def list(self) -> tuple[WebhookSecret, ...]:
        """Every secret, oldest first, including invalid ones."""
        return self._file.read()

    def of(self, tenant: str) -> tuple[str, ...]:
        """The tenant's valid secrets, newest first."""
        now = datetime.now(UTC)
        return tuple(
            record.secret.get_secret_value()
            for record in reversed(self._file.current())
            if record.tenant == tenant and record.valid(now)
        )


def _dump(record: WebhookSecret) -> dict[str, Any]:
    shown = record.model_dump(mode="json", exclude_none=True)
    return shown | {"secret": record.secret.get_secret_value()}
