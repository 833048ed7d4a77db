"""Pauses and file access for `AsyncClient`, without blocking its event loop. sync_io.py has the same for `Client`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from anyio import sleep, to_thread

from inferq.producer.client.transfers import PartialFile, Upload

__all__ = ["chunks_of", "sleep", "write_chunk"]


async def chunks_of(upload: Upload) -> AsyncIterator[bytes]:
    while chunk := await to_thread.run_sync(upload.read):
        yield chunk


async def write_chunk(file: PartialFile, chunk: bytes) -> None:
    await to_thread.run_sync(file.write, chunk)
