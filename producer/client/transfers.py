"""Files to upload to the gateway and to download from it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeGuard

import httpx

from inferq.schemas.batch import SOURCE_SCHEMES

CHUNK_BYTES = 1 << 20

_SHA256 = re.compile(r'"([0-9a-f]{64})"')

Source = str | os.PathLike[str] | bytes | BinaryIO
"""What can be uploaded: a path, the content itself, or an open binary file."""


def is_batch_url(source: Source) -> TypeGuard[str]:
    """Whether the source of a batch is a URL that the gateway can read itself."""
    return isinstance(source, str) and source.partition(":")[0] in SOURCE_SCHEMES


class Upload:
    """A file to upload, read in chunks. `repeatable` tells whether it can be read again from its start."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self.repeatable = file.seekable()
        self._start = file.tell() if self.repeatable else 0

    def arguments(self, filename: str | None, content_type: str | None) -> dict[str, Any]:
        """The arguments of httpx's `post` for the file's name, its type and, if known, its length."""
        headers = {"Content-Type": content_type or "application/octet-stream"}
        if self.repeatable:
            headers["Content-Length"] = str(self._file.seek(0, io.SEEK_END) - self._start)
        # A file name on Linux can be any bytes. A URL needs text.
        name = (filename or self._name).encode("utf-8", "replace").decode()
        return {"params": {"filename": name}, "headers": headers}

    def rewind(self) -> None:
        if self.repeatable:
            self._file.seek(self._start)

    def read(self) -> bytes:
        """The next chunk, at most `CHUNK_BYTES`; empty at the end."""
        return self._file.read(CHUNK_BYTES)


@contextmanager
def open_upload(source: Source) -> Iterator[Upload]:
    """Open the source for the block. A file that is open already stays open afterwards."""
    if isinstance(source, bytes):
        yield Upload(io.BytesIO(source), "")
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        with path.open("rb") as file:
            yield Upload(file, path.name)
    else:
        yield Upload(source, "")


class PartialFile:
    """A download that is being written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._file.write(chunk)

    def check(self, response: httpx.Response) -> None:
        """Compare the content with the response's ETag. Raises httpx.RemoteProtocolError if they differ."""
        expected = _SHA256.fullmatch(response.headers.get("etag", ""))
        if expected and expected[1] != self._hash.hexdigest():
            raise httpx.RemoteProtocolError(
                "the downloaded file is damaged: its SHA-256 is not the one that the gateway sent"
            )


def target_path(path: str | os.PathLike[str], name: str) -> Path:
    """The file to download to: `path` itself, or `name` within it if `path` is a folder."""
    given = Path(path)
    return given / Path(name).name if given.is_dir() else given


@contextmanager
def new_file(path: Path) -> Iterator[PartialFile]:
    """Write a file that appears at `path` when the block ends without an error, and not before."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            yield PartialFile(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
