"""Reading the URLs of inputs: strictly, and without repeating their secrets."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import idna

from schemas import InvalidTask

_PORTS = {"http": 80, "https": 443}
_SHOWN = 200
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters and lone surrogates: no key has them, and logs and headers cannot carry them."""
_S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)", re.IGNORECASE | re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f\\]")
# What RFC 3986 allows in a path or a query, and what people leave unescaped there.
_TARGET_SAFE = "!#$%&'()*+,/:;=?@[]~|^{}`\"<>"


@dataclass(frozen=True)
class HttpUrl:
    """An http or https URL in its parts; `host` has no brackets, `target` is the path with the query."""

    scheme: str
    host: str
    port: int
    target: str
    credentials: bytes | None = None

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_http_url(url: str) -> HttpUrl:
    """The parts of an absolute URL. `user:password@` becomes credentials for basic authentication.

    Raises InvalidTask (`bad_input_url`) for what two readers could read in two ways: control characters,
    spaces, backslashes, an empty host, a port outside 1-65535.
    """
    if _UNPRINTABLE.search(url):
        raise _bad("the URL holds a space, a control character or a backslash: percent-encode it")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = _host(parts.hostname or "", bracketed="[" in parts.netloc)
    except ValueError as error:  # UnicodeError is one
        raise _bad(f"the URL is not valid: {error}") from error
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise _bad(f"the scheme {scheme[:20]!r} is not http or https")
    if port == 0:
        raise _bad("port 0 does not exist")
    path = quote(parts.path or "/", safe=_TARGET_SAFE.replace("?", "").replace("#", ""), errors="replace")
    if parts.query:
        path += "?" + quote(parts.query, safe=_TARGET_SAFE.replace("#", ""), errors="replace")
    credentials = None
    if parts.username is not None:
        pair = unquote_to_bytes(parts.username) + b":" + unquote_to_bytes(parts.password or "")
        credentials = base64.b64encode(pair)
    return HttpUrl(scheme, host, port or _PORTS[scheme], path, credentials)


def redirect_url(base: str, location: str) -> str:
    """Where a redirect from `base` leads, without a fragment."""
    try:
        return urljoin(base, location.strip().replace(" ", "%20")).partition("#")[0]
    except ValueError as error:
        raise _bad(f"a redirect leads to a URL that is not valid: {error}") from error


def read_data_url(url: str) -> tuple[bytes, str]:
    """The data and the content type of a `data:` URL (RFC 2397). Raises InvalidTask (`bad_input_url`)."""
    header, comma, body = url.partition(":")[2].partition(",")
    if not comma:
        raise _bad("a data: URL has a comma before its data")
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


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; the key is taken literally. Raises InvalidTask."""
    match = _S3.fullmatch(url)
    if not match:
        raise _bad("an s3: URL looks like s3://bucket/key")
    bucket, key = match[1], match[2]
    # Some clients and servers resolve such segments, and would end up at another object.
    if any(segment in {"", ".", ".."} for segment in key.rstrip("/").split("/")) or _CONTROL.search(key):
        raise _bad("the key of an s3: URL has an empty, '.' or '..' segment, or a control character")
    return bucket, key


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


def _host(host: str, *, bracketed: bool) -> str:
    host = host.removesuffix(".")
    if bracketed:
        if "%" in host:
            raise ValueError("an IPv6 zone means nothing to anybody else")
        return str(IPv6Address(host))
    if not host.isascii():
        # As browsers do: the standard library's own codec takes some names for somebody else's.
        host = idna.encode(host, uts46=True).decode()
    if not _HOST.fullmatch(host) or ".." in host or len(host) > 253:
        raise ValueError(f"{host[:80]!r} is not a host name" if host else "it has no host")
    return host


def _bad(message: str) -> InvalidTask:
    return InvalidTask(message, code="bad_input_url")
