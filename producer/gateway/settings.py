"""The settings of the HTTP gateway."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from inferq.schemas import Settings


class GatewaySettings(Settings):
    """The HTTP gateway's own settings; the broker and the stores have theirs."""

    gateway_host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    gateway_port: int = Field(8000, ge=0, le=65535, description="Port of the gateway; 0 takes a free one.")
    api_keys_file: Path = Field(
        Path(".inferq/api-keys.json"), description="File of API keys (digests only) and their tenants."
    )
    max_upload_bytes: int = Field(
        512 * 1024 * 1024, gt=0, description="Largest file that may be uploaded, in bytes."
    )
    max_uploads: int = Field(
        32,
        gt=0,
        description="Uploads at the same time, three quarters of them of one tenant; further ones wait.",
    )
    submit_timeout: float = Field(
        5.0, gt=0, description="Seconds to wait for the broker's confirm before the gateway answers 503."
    )
    max_connections: int | None = Field(
        None,
        gt=0,
        description="Connections to the gateway at a time (default: less than half of the process's limit of "
        "open files, 10,000 at most). At the limit, idle connections end; then new requests get 503.",
    )
    max_connections_per_address: int | None = Field(
        None,
        gt=0,
        description="Connections of one client address at a time (default: half of `max_connections`). It does not "
        "apply to `trusted_proxies`.",
    )
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (),
        description="Addresses and networks (CIDRs) of reverse proxies, separated by commas. Only for these "
        "does the log use `X-Forwarded-For`, and they may open more connections than other addresses.",
    )
    gateway_store_timeout: float = Field(
        20.0,
        gt=0,
        description="Seconds that one call of the gateway to the object store may take; then it answers 503.",
    )
    body_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds that a client may pause while it sends a request's body, and that an upload waits for "
        "its turn. After as many seconds of waiting for it, a client has to send 8 KiB per second on average.",
    )
    events_heartbeat: float = Field(
        15.0, gt=0, description="Seconds between two heartbeats of an event stream."
    )
    shutdown_grace: float = Field(
        10.0, gt=0, description="Seconds that requests in flight get to finish when the gateway stops."
    )

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
