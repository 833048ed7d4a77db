from __future__ import annotations

import hashlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from inferq.producer.gateway.multipart import FormFile
from inferq.producer.gateway.problems import ProblemError
from inferq.storage.objects.results import upload_key
from tests.gateway.conftest import FakePublisher, Gateway, running, wait_until
from tests.gateway.test_gateway_submit import problem


def stored(gateway: Gateway, url: str) -> bytes:
    return gateway.store.get(upload_key(gateway.tenant, url.removeprefix("inferq:")))


def everything(gateway: Gateway) -> list[str]:
    return [info.key for info in gateway.store.list(f"files/{gateway.tenant}/")]


def scratch(gateway: Gateway) -> list[Path]:
    """Files that are being written."""
    own = (gateway.folder / "store" / ".inferq").rglob("*")
    return [path for path in own if path.is_file() and path.name != "identity"]


def pieces(data: bytes, size: int = 65536) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_is_stored_as_it_came(gateway: Gateway, chunked: bool) -> None:
    data = os.urandom(3_000_001)
    response = gateway.http.post(
        "/v1/files?filename=scan.PNG",
        content=pieces(data) if chunked else data,
        headers={"Content-Type": "image/png"},
    )
    assert response.status_code == 201, response.text
    answer = response.json()
    assert answer["bytes"] == len(data)
    assert answer["sha256"] == hashlib.sha256(data).hexdigest()
    assert answer["url"].startswith("inferq:")
    assert answer["url"].endswith(".png")
    assert stored(gateway, answer["url"]) == data
    info = gateway.store.stat(upload_key(gateway.tenant, answer["url"].removeprefix("inferq:")))
    assert info.content_type == "image/png"
    task = {"task_type": "ocr", "image_url": answer["url"]}
    assert gateway.http.post("/v1/tasks", json=task).status_code == 202


@pytest.mark.parametrize(
    ("query", "content_type", "extension"),
    [
        ("", "application/pdf", ".pdf"),
        ("", "", ".bin"),
        ("?filename=a.jpeg", "application/octet-stream", ".jpeg"),
        ("?filename=../../etc/passwd.sh", "image/png", ".sh"),
        ("?filename=x.tar%00.gz%2f..", "image/png", ".png"),
        ("?filename=.hidden", "image/gif", ".gif"),
        ("?filename=x.toolongextension", "", ".bin"),
        ("?filename=%C3%A9.%C3%A9", "text/html; charset=utf-8", ".html"),
    ],
)
def test_the_id_has_a_harmless_extension(
    gateway: Gateway, query: str, content_type: str, extension: str
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    url = gateway.http.post(f"/v1/files{query}", content=b"x", headers=headers).json()["url"]
    assert url.removeprefix("inferq:")[36:] == extension
    assert stored(gateway, url) == b"x"


def test_an_upload_without_content_is_refused_and_not_stored(gateway: Gateway) -> None:
    problem(gateway.http.post("/v1/files"), 422, "empty_file")
    problem(gateway.http.post("/v1/files", content=iter([])), 422, "empty_file")
    problem(gateway.http.post("/v1/files", files={"file": ("a.txt", b"")}), 422, "empty_file")
    jsonl = {"Content-Type": "application/x-ndjson"}
    problem(gateway.http.post("/v1/batches", headers=jsonl), 422, "empty_batch")
    assert everything(gateway) == []


def test_a_form_with_one_file(gateway: Gateway) -> None:
    data = os.urandom(500_000) + b"\r\n--boundary\r\n--"
    response = gateway.http.post(
        "/v1/files", data={"comment": "hello"}, files={"file": ("page.tiff", data, "image/tiff")}
    )
    assert response.status_code == 201, response.text
    assert response.json()["content_type"] == "image/tiff"
    assert response.json()["url"].endswith(".tiff")
    assert stored(gateway, response.json()["url"]) == data


@pytest.mark.parametrize(
    ("body", "boundary", "status", "code"),
    [
        (b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n1\r\n--b--\r\n", "b", 422, "no_file"),
        (b"--b--\r\n", "b", 422, "no_file"),
        (b"nonsense", "b", 400, "bad_form"),
        (b'--b\r\nContent-Disposition: form-data; name=x; filename="a"\r\n\r\nhalf', "b", 400, "bad_form"),
        (b"", "b", 400, "bad_form"),
        (b"--b--", "", 400, "bad_form"),
        (b"--b--", "b" * 1000, 400, "bad_form"),
        (
            b'--b\r\nContent-Disposition: form-data; name=x; filename="a"\r\n\r\n1\r\n'
            b'--b\r\nContent-Disposition: form-data; name=y; filename="b"\r\n\r\n2\r\n--b--\r\n',
            "b",
            422,
            "several_files",
        ),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(
    gateway: Gateway, body: bytes, boundary: str, status: int, code: str
) -> None:
    headers = {
        "Content-Type": f"multipart/form-data; boundary={boundary}" if boundary else "multipart/form-data"
    }
    problem(gateway.http.post("/v1/files", content=body, headers=headers), status, code)
    assert everything(gateway) == []


@pytest.mark.parametrize("how", ["declared", "chunked", "form"])
def test_an_upload_over_the_limit_leaves_nothing(lone_gateway: Gateway, how: str) -> None:
    data = bytes((1 << 20) + 1)
    if how == "form":
        response = lone_gateway.http.post("/v1/files", files={"file": ("a.bin", data)})
    else:
        response = lone_gateway.http.post("/v1/files", content=pieces(data) if how == "chunked" else data)
    problem(response, 413, "too_large")
    assert everything(lone_gateway) == []
    assert scratch(lone_gateway) == []
    exact = lone_gateway.http.post("/v1/files", content=pieces(data[1:]))
    assert exact.status_code == 201


def test_an_upload_far_over_the_limit_is_cut_off(lone_gateway: Gateway) -> None:
    sent = itertools.count()

    def endless() -> Iterator[bytes]:
        while True:
            next(sent)
            yield bytes(1 << 20)

    with suppress(httpx.TransportError):  # the connection may close before the client reads the answer
        problem(lone_gateway.http.post("/v1/files", content=endless()), 413, "too_large")
    assert next(sent) < 64
    wait_until(lambda: scratch(lone_gateway) == [])
    assert everything(lone_gateway) == []


def test_a_client_that_expects_100_continue_is_refused_before_it_sends(lone_gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(lone_gateway.url).port or 0), timeout=10) as line:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lone_gateway.key}\r\n"
        line.sendall(f"{head}Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n".encode())
        assert line.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("form", [False, True])
def test_an_upload_that_stops_half_way_leaves_nothing(lone_gateway: Gateway, form: bool) -> None:
    begin = b""
    kind = "image/png"
    if form:
        kind = "multipart/form-data; boundary=b"
        begin = b'--b\r\nContent-Disposition: form-data; name=x; filename="a.png"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", httpx.URL(lone_gateway.url).port or 0), timeout=10) as line:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lone_gateway.key}\r\n"
        line.sendall(
            f"{head}Content-Type: {kind}\r\nContent-Length: 500000\r\n\r\n".encode() + begin + bytes(200_000)
        )
        wait_until(lambda: scratch(lone_gateway))
    wait_until(lambda: scratch(lone_gateway) == [])
    assert everything(lone_gateway) == []
    assert lone_gateway.http.post("/v1/files", content=b"next").status_code == 201


def test_slow_uploads_do_not_delay_submissions(
    tmp_path: Path, redis_url: str, publisher: FakePublisher
) -> None:
    with running(tmp_path, redis_url=redis_url, publisher=publisher, max_uploads=2) as gateway:
        release = threading.Event()

        def slow() -> Iterator[bytes]:
            yield b"first"
            release.wait(20)
            yield b"last"

        with ThreadPoolExecutor(4) as threads:
            uploads = [threads.submit(gateway.http.post, "/v1/files", content=slow()) for _ in range(4)]
            wait_until(lambda: len(scratch(gateway)) == 2)
            assert gateway.http.post("/v1/tasks", json={"task_type": "echo"}).status_code == 202
            release.set()
            assert [upload.result(20).status_code for upload in uploads] == [201] * 4


def test_trickled_uploads_of_one_tenant_end_and_leave_room_for_others(
    tmp_path: Path, redis_url: str, publisher: FakePublisher
) -> None:
    with running(
        tmp_path, redis_url=redis_url, publisher=publisher, max_uploads=4, body_timeout=1.0
    ) as gateway:

        def trickled() -> Iterator[bytes]:
            for _ in range(400):
                yield b"x"
                time.sleep(0.05)

        with ThreadPoolExecutor(4) as threads:
            uploads = [threads.submit(gateway.http.post, "/v1/files", content=trickled()) for _ in range(3)]
            wait_until(lambda: len(scratch(gateway)) == 3)
            with gateway.someone() as other:
                assert other.post("/v1/files", content=b"another's").status_code == 201
            for upload in uploads:
                refused = problem(upload.result(15), 408, "request_timeout")
                assert "bytes per second" in refused["detail"]
        assert scratch(gateway) == []
        assert gateway.http.post("/v1/files", content=b"next").status_code == 201


def test_an_upload_that_finds_no_place_is_told_so_in_time(
    tmp_path: Path, redis_url: str, publisher: FakePublisher
) -> None:
    with running(
        tmp_path, redis_url=redis_url, publisher=publisher, max_uploads=1, body_timeout=0.5
    ) as gateway:
        services = gateway.server.config.app.state.services  # type: ignore[union-attr]
        released = threading.Event()
        put = services.store.put
        services.store.put = lambda *given, **more: released.wait(20) and put(*given, **more)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(gateway.http.post, "/v1/files", content=b"first")
            wait_until(lambda: services._uploads.borrowed_tokens)
            problem(gateway.http.post("/v1/files", content=b"second"), 503, "uploads_busy")
            released.set()
            assert first.result(20).status_code == 201
        assert services._tenant_uploads == {}


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="gateway")
    client.close()
    return {"store_url": "s3://gateway/prefix", "s3_endpoint_url": s3_endpoint}


def test_files_and_artifacts_through_s3(
    tmp_path: Path, redis_url: str, publisher: FakePublisher, s3: dict[str, Any]
) -> None:
    with running(
        tmp_path, redis_url=redis_url, publisher=publisher, storage=s3, max_upload_bytes=12 << 20
    ) as gateway:
        data = os.urandom(10 << 20)
        answer = gateway.http.post("/v1/files", content=pieces(data)).json()
        assert answer["sha256"] == hashlib.sha256(data).hexdigest()
        assert stored(gateway, answer["url"]) == data
        problem(gateway.http.post("/v1/files", content=pieces(data + bytes(3 << 20))), 413, "too_large")
        assert len(everything(gateway)) == 1

        task = gateway.began("a")
        file = tmp_path / "file"
        file.write_bytes(data)
        artifact = gateway.results.save_artifact(
            gateway.tenant, "a", "a.bin", file, "application/zip", run="t"
        )
        gateway.end(task, artifacts=(artifact,))
        response = gateway.http.get("/v1/tasks/a/artifacts/a.bin")
        assert (response.content, response.headers["content-type"]) == (data, "application/zip")


@given(st.binary(max_size=300), st.integers(1, 50), st.booleans())
async def test_a_form_is_read_the_same_however_it_is_cut(data: bytes, size: int, field_first: bool) -> None:
    boundary = b"a-boundary-not-in-the-data"
    field = b'--%b\r\nContent-Disposition: form-data; name="f"\r\n\r\nvalue\r\n' % boundary
    file = (
        b'--%b\r\nContent-Disposition: form-data; name="x"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n%b\r\n" % (boundary, data)
    )
    body = (field + file if field_first else file + field) + b"--%b--\r\n" % boundary

    async def cut() -> Any:
        for piece in pieces(body, size):
            yield piece

    form = FormFile(cut(), boundary, limit=len(data))
    await form.begin()
    assert (form.filename, form.content_type) == ("a.png", "image/png")
    assert b"".join([piece async for piece in form.content()]) == data
    if data:
        small = FormFile(cut(), boundary, limit=len(data) - 1)
        with pytest.raises(ProblemError):
            await small.begin()
            _ = [piece async for piece in small.content()]
