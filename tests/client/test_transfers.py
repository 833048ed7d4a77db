"""Uploads and downloads of both clients."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferq.producer.client.errors import InvalidRequest, NotFound, Unavailable
from inferq.storage.objects.results import upload_key
from tests.client.conftest import AnyClient, Connect, Scripted
from tests.gateway.conftest import Gateway


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "file", "pipe"])
async def test_uploads_of_every_kind(
    client: AnyClient, lone_gateway: Gateway, tmp_path: Path, kind: str
) -> None:
    data = os.urandom(1 << 20)[: (1 << 20) - 7]
    path = tmp_path / "scan.jpeg"
    path.write_bytes(data)
    if kind == "pipe":
        read, write = os.pipe()

        def fill() -> None:
            with os.fdopen(write, "wb") as end:
                end.write(data)

        writer = threading.Thread(target=fill)
        writer.start()
        with os.fdopen(read, "rb") as pipe:
            url = await client.upload(pipe, filename="x.jpeg", content_type="image/jpeg")
        writer.join()
    elif kind == "file":
        with path.open("rb") as file:
            file.seek(5)
            url = await client.upload(file, filename="x.jpeg")
            assert not file.closed
        data = data[5:]
    else:
        source: Any = {"path": path, "str": str(path), "bytes": data}[kind]
        url = await client.upload(source, **({"filename": "x.jpeg"} if kind == "bytes" else {}))
    assert url.startswith("inferq:")
    assert url.endswith(".jpeg")
    assert lone_gateway.store.get(upload_key(lone_gateway.tenant, url.removeprefix("inferq:"))) == data


async def test_an_upload_over_the_limit_is_invalid(client: AnyClient) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.upload(bytes((1 << 20) + 1))
    assert caught.value.status == 413


async def test_a_file_whose_name_is_not_utf8_is_uploaded(client: AnyClient, tmp_path: Path) -> None:
    page = tmp_path / os.fsdecode(b"b\xff.png")
    page.write_bytes(b"a")
    assert (await client.upload(page)).endswith(".png")


async def test_an_error_of_the_source_is_raised_unchanged(client: AnyClient) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError("bad disk")

    with pytest.raises(OSError, match="bad disk"):
        await client.upload(io.BufferedReader(Broken()))


async def test_a_source_that_cannot_seek_is_sent_once(connect: Connect) -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    os.close(write)
    transport = Scripted(httpx.ConnectError("refused"))
    with os.fdopen(read, "rb") as pipe:
        with pytest.raises(Unavailable):
            await connect("http://x", "k", transport=transport).upload(pipe)
    assert transport.answers == []


async def test_an_upload_that_failed_is_sent_whole_again(connect: Connect) -> None:
    busy = httpx.Response(503, headers={"Retry-After": "0"})
    transport = Scripted(busy, httpx.Response(201, json={"url": "inferq:a"}))
    client = connect("http://x/base", "k", transport=transport)
    assert await client.upload(b"abc", filename="a.txt") == "inferq:a"
    assert [request.content for request in transport.requests] == [b"abc", b"abc"]
    request = transport.requests[0]
    assert str(request.url) == "http://x/base/v1/files?filename=a.txt"
    assert request.headers["content-length"] == "3"
    assert "transfer-encoding" not in request.headers


async def test_downloads_appear_whole(client: AnyClient, lone_gateway: Gateway, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    file = tmp_path / "source"
    file.write_bytes(data)
    task = lone_gateway.began("d")
    name = "ü 1.bin"
    artifact = lone_gateway.results.save_artifact(task.tenant, "d", name, file, "application/zip", run="t")
    lone_gateway.end(task, artifacts=(artifact,))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert await client.download("d", name, folder) == folder / name
    assert (folder / name).read_bytes() == data
    target = folder / "other"
    target.write_text("old")
    assert await client.download("d", name, target) == target
    assert hashlib.sha256(target.read_bytes()).hexdigest() == artifact.sha256
    with pytest.raises(NotFound):
        await client.download("d", "nonsense", folder / "none")
    assert sorted(path.name for path in folder.iterdir()) == ["other", name]


async def test_a_damaged_download_is_fetched_again(connect: Connect, tmp_path: Path) -> None:
    etag = {"ETag": f'"{hashlib.sha256(b"right").hexdigest()}"'}
    transport = Scripted(
        httpx.Response(200, content=b"wrong", headers=etag),
        httpx.Response(200, content=b"right", headers=etag),
    )
    await connect("http://x", "k", transport=transport).download("a", "f", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"right"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # noqa: ASYNC240


async def test_a_download_has_the_usual_permissions(connect: Connect, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    transport = Scripted(httpx.Response(200, content=b"x"))
    await connect("http://x", "k", transport=transport).download("a", "f", tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode
