"""Parses http and https URLs strictly, because inferq sends requests to them."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import quote, unquote_to_bytes, urlsplit

import idna

from inferq.schemas.errors import InvalidTask

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f\\]")
# Characters that RFC 3986 allows in a path or a query, and others that people leave unescaped.
_TARGET_SAFE = "!#$%&'()*+,/:;=?@[]~|^{}`\"<>"


@dataclass(frozen=True)
class HttpUrl:
    """The parts of an http or https URL. `host` has no brackets; `target` is the path with the query."""

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

    Raises InvalidTask (`bad_input_url`) for URLs that parsers read differently: control characters, spaces,
    backslashes, an empty host, a port outside 1-65535.
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


def _host(host: str, *, bracketed: bool) -> str:
    host = host.removesuffix(".")
    if bracketed:
        if "%" in host:
            raise ValueError("an IPv6 zone means nothing to anybody else")
        return str(IPv6Address(host))
    if not host.isascii():
        # As in browsers. The standard library's codec turns some names into those of other hosts.
        host = idna.encode(host, uts46=True).decode()
    if not _HOST.fullmatch(host) or ".." in host or len(host) > 253:
        raise ValueError(f"{host[:80]!r} is not a host name" if host else "it has no host")
    return host


def _bad(message: str) -> InvalidTask:
    return InvalidTask(message, code="bad_input_url")
