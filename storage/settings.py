"""The settings of the object store, the status index, and input fetching."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from inferq.schemas import Settings

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9a-f:.]+")
"""A host name that boto3 takes, which refuses the underscore of many a compose service; or an IPv6 address."""

Network = IPv4Network | IPv6Network


def _default_store() -> str:
    return (Path.cwd() / ".inferq" / "store").as_uri()


class StorageSettings(Settings):
    """The settings of the object store, of the status index and of input fetching."""

    redis_url: str = Field(
        "redis://localhost:6379/0", description="The URL of Redis, which holds the status index."
    )
    redis_timeout: float = Field(
        1.0,
        gt=0,
        le=60,
        description="Seconds that one call to Redis may take; then Redis counts as unavailable.",
    )
    status_retention: float = Field(
        7 * 86400.0, ge=1, description="Seconds that a task's status is kept after its last change."
    )
    store_url: str = Field(
        default_factory=_default_store,
        description="The object store of results and files: `s3://bucket/prefix` or `file:///folder`. "
        "The default is the folder `.inferq/store` below the current one.",
    )
    store_fsync: bool = Field(
        True,
        description="Whether the local-folder store waits for the disk, so that a power cut loses nothing.",
    )
    store_create: bool = Field(
        True,
        description="Whether a missing or empty folder becomes a new local-folder store. Set it to false once the "
        "store exists, if a disk is mounted there: then no part uses the folder while the disk is missing.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="The URL of the S3 service, if it is not AWS (MinIO, Ceph, ...)."
    )
    api_url: str = Field(
        "http://127.0.0.1:8000",
        description="The gateway's address, as its users reach it.",
    )
    fetch_max_bytes: int = Field(512 * 1024**2, gt=0, description="The largest input, in bytes.")
    fetch_timeout: float = Field(120.0, gt=0, description="Seconds that one whole download may take.")
    fetch_allowed_networks: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="Private networks that inputs may come from: CIDRs, separated by commas.",
    )
    fetch_s3_buckets: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Buckets that `s3:` inputs may come from, separated by commas."
    )

    @field_validator("s3_endpoint_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        """boto3 says so only at the first call, and without the variable's name."""
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.hostname or ""):
            raise ValueError(
                "give http://host:port or https://host:port, where the host's name has letters, digits, hyphens and "
                "dots only"
            )
        return value

    @field_validator("fetch_allowed_networks", "fetch_s3_buckets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
