"""Fetches a task's inputs: each untrusted URL becomes a file in the scratch folder.

A fault of the URL or of its target is InvalidTask, with one of these codes:
    bad_input_url         the URL itself is wrong
    address_refused       it leads to no address, or to one that is not public
    certificate_refused   the server's certificate is not valid, which retries rarely change
    input_not_found       there is no such object (404, 410)
    input_refused         the server or our own rules refuse it (other 4xx of HTTP, redirects, buckets)
    input_too_large
A fault that may pass is TransientFailure `download_failed`. So is an S3 bucket that does not exist or refuses access:
an operator has allowed it, the task is not at fault. Proxies from the environment are not used: a proxy would
resolve the names itself.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext

from inferq.schemas import InvalidTask, TransientFailure
from inferq.schemas.s3_url import split_s3_url
from inferq.storage.fetch.addresses import USUAL_PACE, Pace, Resolver, system_resolver
from inferq.storage.fetch.http import HttpSource
from inferq.storage.fetch.urls import read_data_url, redacted
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import (
    DEFAULT_TYPE,
    ObjectNotFound,
    ObjectStore,
    StoreOutage,
    StoreUnreachable,
    clean_type,
)
from inferq.storage.settings import StorageSettings

_log = logging.getLogger(__name__)


class ScratchUnavailable(TransientFailure):
    """The scratch folder cannot hold the input: the disk is full or not writable.

    Not an Outage: an input too large for this disk would stop the worker for good, while another may have room.
    """

    code = "scratch_unavailable"


@dataclass(frozen=True)
class Fetched:
    """An input on disk; `sha256` is hexadecimal, `content_type` comes from its source."""

    path: Path
    bytes: int
    content_type: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """An opened input: its pieces, its length in bytes if that is known, and its content type."""

    chunks: Iterable[bytes]
    length: int | None
    content_type: str


class Fetcher:
    """Fetches inputs by `https:`, `http:`, `s3:`, `data:` and `inferq:` URLs, from many threads.

    `resolver` and `ssl_context` default to the system's.
    """

    def __init__(
        self,
        store: ObjectStore,
        settings: StorageSettings,
        *,
        resolver: Resolver = system_resolver,
        ssl_context: SSLContext | None = None,
        pace: Pace = USUAL_PACE,
    ) -> None:
        self._store = store
        self._settings = settings
        self._http = HttpSource(
            settings.fetch_allowed_networks, resolver=resolver, ssl_context=ssl_context, pace=pace
        )

    def fetch(
        self, url: str, folder: Path, name: str, *, tenant: str, checkpoint: Callable[[], None] | None = None
    ) -> Fetched:
        """Fetch an input to `folder/name`, in constant memory; an error leaves nothing there.

        `name` is the task's field, for messages. `tenant` says whose uploads `inferq:` means. `checkpoint` is
        called for each piece and while it waits for a server; it may raise to give up. Raises InvalidTask,
        TransientFailure, and Outage if our own store is unavailable, or S3 refuses this machine's credentials or
        clock.
        """
        where = f"{name} {redacted(url)}"
        path = folder / name
        try:
            with self._open(url, tenant, checkpoint or _go_on) as source:
                return self._save(source, path, checkpoint)
        except (InvalidTask, TransientFailure) as error:
            path.unlink(missing_ok=True)
            raise type(error)(f"{where}: {error}", code=error.code) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Close the connections that are kept for the next download."""
        self._http.close()

    @contextmanager
    def _open(self, url: str, tenant: str, checkpoint: Callable[[], None]) -> Iterator[Source]:
        scheme = url.partition(":")[0].lower()
        match scheme:
            case "http" | "https":
                with self._http.open(url, self._settings.fetch_timeout, checkpoint) as response:
                    yield Source(response.chunks, response.length, response.content_type)
            case "data":
                data, content_type = read_data_url(url)
                yield Source([data], len(data), content_type)
            case "inferq":
                with self._uploaded(url.partition(":")[2], tenant) as source:
                    yield source
            case "s3":
                with self._from_s3(url) as source:
                    yield source
            case _:
                raise InvalidTask(f"the scheme {scheme[:20]!r} is not supported", code="bad_input_url")

    @contextmanager
    def _uploaded(self, file_id: str, tenant: str) -> Iterator[Source]:
        key = upload_key(tenant, file_id)
        try:
            info = self._store.stat(key)
            chunks = self._store.stream(key)
        except ObjectNotFound as error:
            raise InvalidTask("there is no such upload", code="input_not_found") from error
        with closing(chunks):
            yield Source(chunks, info.bytes, info.content_type)

    @contextmanager
    def _from_s3(self, url: str) -> Iterator[Source]:
        bucket, key = split_s3_url(url)
        if bucket not in self._settings.fetch_s3_buckets:
            raise InvalidTask(
                f"bucket {bucket!r} is not one that inputs may come from; an operator can allow it by "
                "INFERQ_FETCH_S3_BUCKETS",
                code="input_refused",
            )
        if self._store.holds(f"s3://{bucket}/{key}"):
            raise InvalidTask(
                "results and uploads of inferq cannot be read by their s3: URL; upload the file, or copy it",
                code="input_refused",
            )
        from inferq.storage.objects.s3 import CredentialsRefused, open_object

        try:
            found, chunks = open_object(self._settings.s3_endpoint_url, bucket, key)
            with closing(chunks):
                yield Source(chunks, found.bytes, found.content_type)
        except ObjectNotFound as error:
            raise InvalidTask("there is no such object", code="input_not_found") from error
        except CredentialsRefused:
            raise  # this machine's fault, which would fail every such task
        except StoreOutage as error:
            # Not our own store: a bucket that refuses us must not stop the worker.
            _log.warning("bucket %r: %s", bucket, error)
            hidden = isinstance(error, StoreUnreachable)
            reason = f"bucket {bucket!r} cannot be read now; the log says why" if hidden else str(error)
            raise TransientFailure(reason, code="download_failed") from error

    def _save(self, source: Source, path: Path, checkpoint: Callable[[], None] | None) -> Fetched:
        limit = self._settings.fetch_max_bytes
        if source.length is not None and source.length > limit:
            raise _too_large(limit)
        ends = time.monotonic() + self._settings.fetch_timeout
        digest = hashlib.sha256()
        size = 0
        try:
            file = path.open("wb", buffering=0)
        except OSError as error:
            raise _scratch_outage(path, error) from error
        with file:
            for chunk in source.chunks:
                size += len(chunk)
                if checkpoint is not None:
                    checkpoint()
                if size > limit:
                    raise _too_large(limit)
                if time.monotonic() > ends:
                    raise TransientFailure(
                        f"the download took longer than {self._settings.fetch_timeout:g} s",
                        code="download_failed",
                    )
                digest.update(chunk)
                try:
                    left = memoryview(chunk)
                    while left:
                        left = left[file.write(left) or 0 :]
                except OSError as error:
                    raise _scratch_outage(path, error) from error
        content_type = clean_type(source.content_type.strip()) if source.content_type else DEFAULT_TYPE
        return Fetched(path, size, content_type, digest.hexdigest())


def _go_on() -> None:
    """A checkpoint that lets everything go on."""


def _too_large(limit: int) -> InvalidTask:
    return InvalidTask(f"the input is larger than {limit} bytes", code="input_too_large")


def _scratch_outage(path: Path, error: OSError) -> ScratchUnavailable:
    _log.error("%s cannot be written: %s; free some space or check its rights", path, error.strerror)
    return ScratchUnavailable(f"the worker's scratch folder cannot be written: {error.strerror}")
