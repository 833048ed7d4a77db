"""Reads the URLs of inputs strictly, and shows them without their secrets."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes, urljoin

from inferq.schemas import InvalidTask

_SHOWN = 200


def redirect_url(base: str, location: str) -> str:
    """The target of a redirect from `base`, without a fragment."""
    try:
        return urljoin(base, location.strip().replace(" ", "%20")).partition("#")[0]
    except ValueError as error:
        raise _bad(f"a redirect leads to a URL that is not valid: {error}") from error


def read_data_url(url: str) -> tuple[bytes, str]:
    """The data and the content type of a `data:` URL (RFC 2397). Raises InvalidTask (`bad_input_url`)."""
    header, comma, body = url.partition(":")[2].partition(",")
    if not comma:
        raise _bad("a data: URL needs a comma before its data")
    *parts, last = header.split(";")
    is_base64 = last.strip().lower() == "base64" and bool(parts)
    media = ";".join(parts) if is_base64 else header
    if media.startswith(";"):
        media = "text/plain" + media
    data = unquote_to_bytes(body)
    if is_base64:
        compact = b"".join(data.split()).replace(b"-", b"+").replace(b"_", b"/")
        try:
            data = base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
        except binascii.Error as error:
            raise _bad(f"the data: URL is not valid base64: {error}") from error
    return data, media.strip() or "text/plain;charset=US-ASCII"


def redacted(url: str) -> str:
    """The URL as it may be shown: without user, password, query values, fragment and inline data."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        return f"data:{rest.partition(',')[0][:80]},..."
    head, query, _ = rest.partition("#")[0].partition("?")
    if head.startswith("//"):
        authority, slash, path = head[2:].partition("/")
        head = f"//{authority.rpartition('@')[2]}{slash}{path}"
    shown = "".join(c if c.isprintable() else "?" for c in f"{scheme}:{head}{query and '?...'}")
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def _bad(message: str) -> InvalidTask:
    return InvalidTask(message, code="bad_input_url")
