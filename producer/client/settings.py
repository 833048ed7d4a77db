"""The settings of the Python client and the command line."""

from __future__ import annotations

from pydantic import Field, SecretStr

from inferq.schemas import Settings


class ClientSettings(Settings):
    """The gateway's address and the API key for the Python client and the command line."""

    api_url: str = Field(
        "http://127.0.0.1:8000",
        description="The gateway's address, as its users reach it.",
    )
    api_key: SecretStr | None = Field(None, description="The API key that a client sends to the gateway.")
