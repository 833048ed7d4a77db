"""Fetching inputs from servers that fail in every way, and from URLs that mean harm."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from inferq.schemas import TransientFailure
from inferq.storage import Fetched, Fetcher, ScratchUnavailable, StorageSettings, StoreOutage, upload_key
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.s3 import S3Store
from tests.storage.fetch.conftest import LOOPBACK, Fetch, Server, failed, refused
from tests.waiting import eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def test_a_file_comes_with_its_type_size_and_digest(fetch: Fetch, server: Server, scratch: Path) -> None:
    server.ok("/a?b=c", b"pixels", "Content-Type: image/png; x=y")
    fetched = fetch(server.url("/a?b=c#fragment"))
    assert fetched == Fetched(
        scratch / "image_url", 6, "image/png; x=y", hashlib.sha256(b"pixels").hexdigest()
    )
    assert fetched.path.read_bytes() == b"pixels"
    request = server.requests[0].decode().lower()
    assert request.startswith("get /a?b=c http/1.1\r\n")
    assert f"host: 127.0.0.1:{server.port}\r\n" in request
    assert "accept-encoding: identity\r\n" in request
    assert "authorization" not in request


def test_an_empty_file_without_a_type_is_a_file(fetch: Fetch, server: Server) -> None:
    server.ok("/", b"")
    fetched = fetch(server.url())
    assert (fetched.bytes, fetched.content_type) == (0, "application/octet-stream")


def test_bodies_of_every_framing_arrive(fetch: Fetch, server: Server) -> None:
    server.answers["/chunked"] = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: v\r\n\r\n"
    )
    server.answers["/close"] = lambda s: s.sendall(b"HTTP/1.0 200 OK\r\n\r\nabcde")
    for path in ("/chunked", "/close"):
        assert fetch(server.url(path)).path.read_bytes() == b"abcde"


def test_connections_are_kept_for_the_next_input(fetch: Fetch, server: Server) -> None:
    server.ok("/", b"x")
    for _ in range(5):
        fetch(server.url())
    assert server.connections == 1


def test_a_kept_connection_that_the_server_closed_is_replaced(fetch: Fetch, server: Server) -> None:
    server.ok("/", b"x")
    server.answers["/close"] = lambda s: s.close()
    fetch(server.url())
    failed(fetch, server.url("/close"))
    assert fetch(server.url()).bytes == 1
    assert [request.split()[1] for request in server.requests] == [b"/", b"/close", b"/close", b"/"]


def test_a_fresh_connection_that_the_server_closes_is_no_reason_to_ask_twice(
    fetch: Fetch, server: Server
) -> None:
    server.answers["/close"] = lambda s: s.close()
    failed(fetch, server.url("/close"))
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "code"), [
    (404, "input_not_found"), (410, "input_not_found"), (401, "input_refused"), (403, "input_refused"),
    (400, "input_refused"), (418, "input_refused"), (451, "input_refused"), (204, "input_refused"),
    (206, "input_refused"), (300, "input_refused"), (304, "input_refused"),
])  # fmt: skip
def test_what_a_server_does_not_give_is_invalid(
    fetch: Fetch, server: Server, status: int, code: str, scratch: Path
) -> None:
    server.status("/", status)
    assert str(status) in refused(fetch, server.url(), code)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("status", [202, 408, 425, 429, 500, 502, 503, 504, 599])
def test_what_may_pass_is_transient(fetch: Fetch, server: Server, status: int) -> None:
    server.status("/", status)
    assert str(status) in failed(fetch, server.url())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsho",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"not http at all\r\n\r\n",
        b"",
    ],
)
def test_a_broken_answer_is_transient_and_leaves_nothing(
    fetch: Fetch, server: Server, answer: bytes, scratch: Path
) -> None:
    server.answers["/"] = lambda s: s.sendall(answer)
    failed(fetch, server.url())
    assert list(scratch.iterdir()) == []


def test_a_connection_that_is_refused_is_transient(fetch: Fetch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    failed(fetch, f"http://127.0.0.1:{port}/")


def test_data_urls_are_fetched(make_fetch: Callable[..., Fetch]) -> None:
    fetched = make_fetch()("data:image/png;base64,aGk=")
    assert (fetched.path.read_bytes(), fetched.content_type) == (b"hi", "image/png")
    fetch = make_fetch(fetch_max_bytes=3)
    refused(fetch, "data:,four", "input_too_large")
    refused(fetch, "data:nothing", "bad_input_url")


def test_an_upload_is_its_tenants_alone(fetch: Fetch, local_store: LocalStore) -> None:
    local_store.put(upload_key("acme", "abc.png"), b"pixels", content_type="image/png")
    fetched = fetch("inferq:abc.png")
    assert (fetched.path.read_bytes(), fetched.content_type) == (b"pixels", "image/png")
    refused(fetch, "inferq:abc.png", "input_not_found", tenant="other")
    refused(fetch, "inferq:missing", "input_not_found")
    for bad in ("", "../acme/abc.png", "/abc.png", "a/b", "//x", "abc.png?", "%2e%2e"):
        refused(fetch, f"inferq:{bad}", "bad_input_url")


def test_a_store_that_is_away_is_an_outage_and_not_the_tasks_fault(make_fetch: Callable[..., Fetch]) -> None:
    fetch = make_fetch(S3Store("bucket", endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreOutage):
        fetch("inferq:abc")


@pytest.mark.parametrize("url", ["", "x", "ftp://h/", "file:///etc/passwd", "javascript:1", "S4://x", "://"])
def test_other_schemes_are_refused(fetch: Fetch, url: str) -> None:
    refused(fetch, url, "bad_input_url")


def test_s3_inputs_come_from_listed_buckets_only(
    make_fetch: Callable[..., Fetch], s3: S3Client, s3_url: str, bucket: str
) -> None:
    s3.put_object(Bucket=bucket, Key="in/a b#c?.png", Body=b"pixels", ContentType="image/png")
    fetch = make_fetch(s3_endpoint_url=s3_url, fetch_s3_buckets=(bucket, "missing-bucket"))
    fetched = fetch(f"s3://{bucket}/in/a b#c?.png")
    assert (fetched.path.read_bytes(), fetched.content_type) == (b"pixels", "image/png")
    refused(fetch, f"s3://{bucket}/in/none", "input_not_found")
    assert "NoSuchBucket" in failed(fetch, "s3://missing-bucket/k")
    assert "INFERQ_FETCH_S3_BUCKETS" in refused(fetch, "s3://unlisted/k", "input_refused")
    refused(fetch, f"s3://{bucket}/in/../x", "bad_input_url")
    small = make_fetch(s3_endpoint_url=s3_url, fetch_s3_buckets=(bucket,), fetch_max_bytes=5)
    refused(small, f"s3://{bucket}/in/a b#c?.png", "input_too_large")


def test_nobodys_results_are_to_be_had_as_an_s3_input(
    make_fetch: Callable[..., Fetch], s3: S3Client, s3_url: str, bucket: str
) -> None:
    store = S3Store(bucket, "own", client=s3)
    store.put("tasks/other/t/result.json", b"secret")
    s3.put_object(Bucket=bucket, Key="owner/x", Body=b"fine")
    fetch = make_fetch(store, s3_endpoint_url=s3_url, fetch_s3_buckets=(bucket,))
    refused(fetch, f"s3://{bucket}/own/tasks/other/t/result.json", "input_refused")
    refused(fetch, f"S3://{bucket}/own/x", "input_refused")
    refused(fetch, f"s3://{bucket.upper()}/own/x", "input_refused")
    assert fetch(f"s3://{bucket}/owner/x").bytes == 4
    whole = make_fetch(S3Store(bucket, client=s3), s3_endpoint_url=s3_url, fetch_s3_buckets=(bucket,))
    refused(whole, f"s3://{bucket}/owner/x", "input_refused")


def test_an_s3_that_is_away_is_transient_for_an_input_and_its_address_is_for_the_log_alone(
    make_fetch: Callable[..., Fetch], caplog: pytest.LogCaptureFixture
) -> None:
    fetch = make_fetch(s3_endpoint_url="http://127.0.0.1:9", fetch_s3_buckets=("bucket",))
    message = failed(fetch, "s3://bucket/k")
    assert message == "image_url s3://bucket/k: bucket 'bucket' cannot be read now; the log says why"
    assert "http://127.0.0.1:9" in caplog.text


def test_a_full_scratch_disk_fails_the_attempt_and_not_the_worker(fetch: Fetch, scratch: Path) -> None:
    (scratch / "image_url").symlink_to("/dev/full")
    with pytest.raises(ScratchUnavailable, match="space") as caught:
        fetch("data:,x")
    assert isinstance(caught.value, TransientFailure)
    scratch.rmdir()
    with pytest.raises(ScratchUnavailable):
        fetch("data:,x")


def test_many_threads_fetch_at_once_each_with_its_own_deadline(
    make_fetch: Callable[..., Fetch], server: Server, local_store: LocalStore, tmp_path: Path
) -> None:
    server.ok("/", b"x" * 10_000)
    with_settings = StorageSettings(fetch_allowed_networks=LOOPBACK, fetch_timeout=60)
    fetcher = Fetcher(local_store, with_settings)
    done: list[int] = []

    def work(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(10):
            done.append(fetcher.fetch(server.url(), folder, "image_url", tenant="t").bytes)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetcher.close()
    assert done == [10_000] * 80
    eventually(lambda: server.connections <= 8)
