"""Downloads over http(s): own handling of redirects, one deadline for all, permitted addresses only."""

from __future__ import annotations

import gzip
import io
import ssl
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpcore

from inferq.schemas import InvalidTask, TransientFailure
from inferq.schemas.http_url import HttpUrl, parse_http_url
from inferq.storage.fetch.addresses import AddressPolicy, Pace, Resolver
from inferq.storage.fetch.pool import HttpPool, header_of
from inferq.storage.fetch.urls import redacted, redirect_url
from inferq.storage.settings import Network

MAX_REDIRECTS = 5

_CHUNK_BYTES = 1 << 18
_REDIRECTS = {301, 302, 303, 307, 308}
_WAIT = {202, 408, 425, 429}
_GONE = {404, 410}


@dataclass(frozen=True)
class Download:
    """An answer's body in pieces, decoded; `length` in bytes if the server said it and it is certain."""

    chunks: Iterable[bytes]
    length: int | None
    content_type: str


class HttpSource:
    """Opens downloads, over connections that are kept for the next download from the same server."""

    def __init__(
        self,
        allowed: Iterable[Network],
        *,
        resolver: Resolver,
        ssl_context: ssl.SSLContext | None,
        pace: Pace,
    ) -> None:
        policy = AddressPolicy(allowed, setting="INFERQ_FETCH_ALLOWED_NETWORKS")
        self._pool = HttpPool(policy, resolver=resolver, ssl_context=ssl_context, pace=pace)

    def close(self) -> None:
        self._pool.close()

    @contextmanager
    def open(self, url: str, seconds: float, checkpoint: Callable[[], None]) -> Iterator[Download]:
        """Begin a download that has to end, redirects included, within `seconds`.

        `checkpoint` is called while it waits for the server, and may raise to give up.
        """
        with self._pool.deadline(seconds, checkpoint), _network_errors(seconds), ExitStack() as stack:
            response = self._follow(url, stack)
            yield _download(response)

    def _follow(self, url: str, stack: ExitStack) -> httpcore.Response:
        target = first = parse_http_url(url)
        for _ in range(MAX_REDIRECTS + 1):
            credentials = first.credentials if target.origin == first.origin else None
            response = self._send(target, credentials, stack)
            if response.status not in _REDIRECTS:
                _check_status(response.status)
                return response
            stack.pop_all().close()  # its body is not read
            location = header_of(response, b"location")
            if not location:
                raise _refused(f"the server answered {response.status} without a Location header")
            url = redirect_url(url, location)
            target = _redirect(target, url)
        raise _refused(f"more than {MAX_REDIRECTS} redirects")

    def _send(self, url: HttpUrl, credentials: bytes | None, stack: ExitStack) -> httpcore.Response:
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if credentials:
            headers["Authorization"] = f"Basic {credentials.decode()}"
        return stack.enter_context(self._pool.exchange("GET", url, headers))


def _redirect(source: HttpUrl, url: str) -> HttpUrl:
    if not url.lower().startswith(("http:", "https:")):
        raise _refused(f"it redirects to {redacted(url)}, and only http and https are followed")
    target = parse_http_url(url)
    if source.scheme == "https" and target.scheme == "http":
        raise _refused(f"it redirects from https to {redacted(url)}, which anybody could read or change")
    return target


def _check_status(status: int) -> None:
    if status in {200, 203}:
        return
    if status in _GONE:
        raise InvalidTask(
            f"the server answered {status}: there is nothing at this URL", code="input_not_found"
        )
    if status in _WAIT or status >= 500:
        raise _failed(f"the server answered {status}")
    raise _refused(f"the server answered {status}")


def _download(response: httpcore.Response) -> Download:
    content_type = header_of(response, b"content-type")
    encoding = header_of(response, b"content-encoding").lower()
    if encoding in {"", "identity"}:
        length = header_of(response, b"content-length")
        return Download(response.iter_stream(), int(length) if length else None, content_type)
    if encoding in {"gzip", "x-gzip"}:
        return Download(_gunzip(response.iter_stream()), None, content_type)
    raise _refused(f"the server sends it encoded as {encoding[:40]!r}, which was not requested")


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # Servers send files that are stored compressed as they are, whatever the request accepts.
    try:
        with gzip.GzipFile(fileobj=io.BufferedReader(_Reader(chunks), _CHUNK_BYTES)) as file:
            while chunk := file.read1(_CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _failed(f"its gzip encoding is broken: {error}") from error


class _Reader(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            piece = next(self._chunks, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


@contextmanager
def _network_errors(seconds: float) -> Iterator[None]:
    try:
        yield
    except httpcore.TimeoutException as error:
        raise _failed(
            f"the server took too long (the whole download may take {seconds:g} s): {error}"
        ) from error
    except httpcore.ConnectError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise InvalidTask(
                f"the server's certificate is not valid: {cause.verify_message}", code="certificate_refused"
            ) from error
        raise _failed(f"the connection failed: {error}") from error
    except httpcore.LocalProtocolError as error:
        raise InvalidTask(f"the URL cannot be sent: {error}", code="bad_input_url") from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise _failed(f"the download broke off: {error}") from error


def _refused(message: str) -> InvalidTask:
    return InvalidTask(message, code="input_refused")


def _failed(message: str) -> TransientFailure:
    return TransientFailure(message, code="download_failed")
