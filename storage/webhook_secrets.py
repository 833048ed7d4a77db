"""The secrets that callbacks are signed with: a JSON file that says which belong to which tenant.

A secret is `whsec_` and the base64 of 24 to 64 random bytes, as the Standard Webhooks have it. During a
rotation a tenant has two (or more) that are valid at once, and callbacks carry a signature by each.
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
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from inferq.schemas import InferqError, Settings
from inferq.schemas.task import Tenant
from inferq.storage.json_file import JsonFile

PREFIX = "whsec_"
KEEP_SECONDS = 86400.0
"""How long the secrets of before stay valid after a rotation, unless it says otherwise."""

_BYTES = 32


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
        """A name for it that is no secret."""
        return hashlib.sha256(self.secret.get_secret_value().encode()).hexdigest()[:12]

    def valid(self, now: datetime) -> bool:
        return self.until is None or now < self.until


_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


class WebhookSecrets:
    """The secrets in one file. Many processes may read and change it at once; a change shows at once.

    A file that is not there holds no secrets. Any method raises InstallationError for one that cannot be
    read, `of` only the first time: later it keeps to the secrets it has, and logs.
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
        """Give the tenant a new secret; those of before stay valid for `keep` seconds more.

        Raises InferqError where the tenant's name is not one (`bad_tenant`), or `keep` goes beyond all
        dates (`bad_keep`).
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
        """Take a secret away, at once. Raises InferqError (`unknown_secret`) where none has that id."""
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
        """Every secret, the oldest first, those that are no longer valid included."""
        return self._file.read()

    def of(self, tenant: str) -> tuple[str, ...]:
        """The tenant's valid secrets, the newest first."""
        now = datetime.now(UTC)
        return tuple(
            record.secret.get_secret_value()
            for record in reversed(self._file.current())
            if record.tenant == tenant and record.valid(now)
        )


def _dump(record: WebhookSecret) -> dict[str, Any]:
    shown = record.model_dump(mode="json", exclude_none=True)
    return shown | {"secret": record.secret.get_secret_value()}
