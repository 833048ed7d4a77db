"""The settings of `inferq listen`."""

from __future__ import annotations

from pydantic import Field, SecretStr

from inferq.schemas import Settings


class ListenSettings(Settings):
    """What `inferq listen` verifies callbacks with."""

    webhook_secret: SecretStr | None = Field(
        None,
        description="What `inferq listen` verifies callbacks with: a secret, or several with spaces between "
        "them; without one, those in the file of secrets.",
    )
