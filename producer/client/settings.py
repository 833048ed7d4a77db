"""The settings of the Python client and the command line."""

from __future__ import annotations

from pydantic import Field, SecretStr

from inferq.schemas import Settings


class ClientSettings(Settings):
    """Where the Python client and the command line send, and as whom."""

    api_url: str = Field(
        "http://127.0.0.1:8000",
        description="The gateway as its users reach it: where clients send, and the base of links to files.",
    )
    api_key: SecretStr | None = Field(None, description="API key that a client shows to the gateway.")
