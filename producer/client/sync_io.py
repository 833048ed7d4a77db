"""Pauses and file access for `Client`. async_io.py has the same for `AsyncClient`."""

from __future__ import annotations

from collections.abc import Iterator
from time import sleep

from inferq.producer.client.transfers import PartialFile, Upload

__all__ = ["chunks_of", "sleep", "write_chunk"]


def chunks_of(upload: Upload) -> Iterator[bytes]:
    while chunk := upload.read():
        yield chunk


def write_chunk(file: PartialFile, chunk: bytes) -> None:
    file.write(chunk)
