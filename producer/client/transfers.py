"""Files on their way to the gateway and from it."""

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


def is_batch_url(source: Source) -> TypeGuard[str]:
    """Whether the source of a batch is named by its URL, and not a file here."""
    return isinstance(source, str) and source.partition(":")[0] in SOURCE_SCHEMES


class Upload:
    """Something to upload, read in pieces, and from its start again where it can be."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self.repeatable = file.seekable()
        self._start = file.tell() if self.repeatable else 0

    def described(self, filename: str | None, content_type: str | None) -> dict[str, Any]:
        """The arguments of httpx's `post` that tell of the file: its name, type and, if known, length."""
        headers = {"Content-Type": content_type or "application/octet-stream"}
        if self.repeatable:
            headers["Content-Length"] = str(self._file.seek(0, io.SEEK_END) - self._start)
        # Linux lets a file's name be any bytes; those that are no text would not go into a URL.
        name = (filename or self._name).encode("utf-8", "replace").decode()
        return {"params": {"filename": name}, "headers": headers}

    def rewind(self) -> None:
        if self.repeatable:
            self._file.seek(self._start)

    def read(self) -> bytes:
        return self._file.read(CHUNK_BYTES)


@contextmanager
def opened(source: Source) -> Iterator[Upload]:
    """The source as an upload. A file that was open stays open."""
    if isinstance(source, bytes):
        yield Upload(io.BytesIO(source), "")
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        with path.open("rb") as file:
            yield Upload(file, path.name)
    else:
        yield Upload(source, "")


class PartialFile:
    """A download on its way into a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._file.write(chunk)

    def check(self, response: httpx.Response) -> None:
        """Raises httpx.RemoteProtocolError where what came is not what was sent."""
        expected = _SHA256.fullmatch(response.headers.get("etag", ""))
        if expected and expected[1] != self._hash.hexdigest():
            raise httpx.RemoteProtocolError("the file that came has another SHA-256 than the gateway says")


def target(path: str | os.PathLike[str], name: str) -> Path:
    """Where a download goes: the path itself, or under its own name into it where that is a folder."""
    given = Path(path)
    return given / Path(name).name if given.is_dir() else given


@contextmanager
def whole_file(path: Path) -> Iterator[PartialFile]:
    """A file that appears under `path` when the block ends well, and never in part."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            yield PartialFile(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
