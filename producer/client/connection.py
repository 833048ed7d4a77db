"""The gateway's address and the API key, as arguments of httpx's clients."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import httpx

from inferq.producer.client.settings import ClientSettings
from inferq.schemas import InstallationError

_KEY = re.compile(r"[!-~]+")
"""The characters that a bearer token in a header can have: printable ASCII without blanks."""


def connection_arguments(api_url: str | None, api_key: str | None) -> dict[str, Any]:
    """The arguments of `httpx.Client` and `httpx.AsyncClient`: address, API key, connection limit and proxies.

    A value of None is read from the settings. Raises InstallationError for an address or a key that cannot work.
    """
    settings = ClientSettings.load()
    key = api_key or (settings.api_key.get_secret_value() if settings.api_key is not None else None)
    if key and not _KEY.fullmatch(key):
        # The message does not quote it: most of it may be the key.
        raise InstallationError(
            "INFERQ_API_KEY (or api_key) has characters that no API key has, such as blanks; copy it again",
            code="bad_settings",
        )
    url = _address(api_url or settings.api_url)
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        # Each wait holds a connection. With a maximum, a few hundred waits would block every other call until
        # it times out.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
        # A proxy from the environment would resolve a loopback address to its own machine.
        "mounts": {f"all://{url.netloc.decode()}": None} if _is_loopback(url.host) else {},
    }


def _address(api_url: str) -> httpx.URL:
    with suppress(httpx.InvalidURL):
        url = httpx.URL(api_url)
        if url.scheme in ("http", "https") and url.host:
            return url
    # The message does not quote it: it may hold a password.
    raise InstallationError(
        "INFERQ_API_URL (or api_url) is not a valid address; give http://host:port or https://host",
        code="bad_settings",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
