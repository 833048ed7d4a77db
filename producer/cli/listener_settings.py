"""The settings of `inferq listen`."""

from __future__ import annotations

from pydantic import Field, SecretStr

from inferq.schemas import Settings


class ListenSettings(Settings):
    """The secrets with which `inferq listen` verifies callbacks."""

    webhook_secret: SecretStr | None = Field(
        None,
        description="The secrets with which `inferq listen` verifies callbacks, separated by spaces (default: "
        "those in the file of secrets).",
    )
