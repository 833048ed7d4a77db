"""What only S3 does: lost answers, conflicts, refusals. A stubbed service stands in for its rare moods."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING

import botocore.endpoint
import pytest
from botocore.exceptions import NoCredentialsError

from inferq.storage import ObjectNotFound, StoreOutage
from inferq.storage.objects import s3 as s3_module
from inferq.storage.objects.s3 import S3Refused, S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Moody:
    """Answers each request by the next of `answers`: (status, S3 error code or headers)."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str | dict[str, str]]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.writer = ""
        moods = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                moods.requests.append((self.command, dict(self.headers)))
                moods.writer = moods.writer or self.headers.get("x-amz-meta-inferq-writer", "")
                status, what = moods.answers.pop(0)
                body = b""
                self.send_response(status)
                if isinstance(what, str):
                    body = f"<Error><Code>{what}</Code><Message>m</Message></Error>".encode()
                else:
                    for name, value in what.items():
                        self.send_header(name, value.replace("WRITER", moods.writer))
                if "content-length" not in what:
                    self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT  # noqa: N815
            do_HEAD = do_PUT  # noqa: N815
            do_DELETE = do_PUT  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def moody() -> Iterator[Moody]:
    moody = Moody()
    thread = threading.Thread(target=moody.server.serve_forever, args=(0.01,))
    thread.start()
    yield moody
    moody.server.shutdown()
    moody.server.server_close()
    thread.join()


@pytest.fixture
def moody_store(moody: Moody, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    impatient = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(botocore.endpoint, "time", impatient)
    monkeypatch.setattr(s3_module, "time", impatient)
    return S3Store("bucket", endpoint_url=moody.url)


_META = "x-amz-meta-inferq-writer"
_HEAD = {"etag": '"e"', "last-modified": "Fri, 20 Nov 2026 10:00:00 GMT"}


def test_a_create_whose_answer_was_lost_still_knows_that_it_won(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(500, "InternalError"), (412, "PreconditionFailed"), (200, {**_HEAD, _META: "WRITER"})]
    assert moody_store.create("k", b"x", content_type="text/plain") is True
    assert [method for method, _ in moody.requests] == ["PUT", "PUT", "HEAD"]
    assert moody.requests[0][1]["If-None-Match"] == "*"


def test_a_create_that_was_retried_and_lost_knows_that_too(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(503, "SlowDown"), (412, "PreconditionFailed"), (200, {**_HEAD, _META: "another"})]
    assert moody_store.create("k", b"x", content_type="text/plain") is False


def test_a_conflict_with_another_writer_is_tried_again(moody: Moody, moody_store: S3Store) -> None:
    conflict = (409, "ConditionalRequestConflict")
    moody.answers = [conflict, conflict, (412, "PreconditionFailed")]
    assert moody_store.create("k", b"x", content_type="text/plain") is False
    moody.answers = [conflict, (200, {"etag": '"e"'})]
    assert moody_store.create("k", b"x", content_type="text/plain") is True


def test_endless_conflicts_are_an_outage(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(409, "ConditionalRequestConflict")] * 6
    with pytest.raises(StoreOutage, match="ConditionalRequestConflict"):
        moody_store.create("k", b"x", content_type="text/plain")


@pytest.mark.parametrize(
    ("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable")]
)
def test_a_service_that_fails_on_is_an_outage(
    moody: Moody, moody_store: S3Store, status: int, code: str
) -> None:
    moody.answers = [(status, code)] * 3
    with pytest.raises(StoreOutage, match=code):
        moody_store.get("k")
    assert moody.answers == [], "it is tried three times"


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_a_refusal_names_the_rights_that_are_needed(moody: Moody, moody_store: S3Store, code: str) -> None:
    moody.answers = [(403, code)]
    with pytest.raises(S3Refused, match=r"s3:GetObject.*s3:ListBucket"):
        moody_store.get("k")


def test_a_body_that_breaks_off_is_an_outage(moody: Moody, moody_store: S3Store) -> None:
    short = (200, {**_HEAD, "content-length": "1000", "connection": "close"})
    moody.answers = [short, short]
    with pytest.raises(StoreOutage):
        moody_store.get("k")
    with pytest.raises(StoreOutage):
        list(moody_store.stream("k"))


def test_deleting_from_a_service_that_says_404_is_fine(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(404, "NoSuchKey")]
    moody_store.delete("k")


def test_a_missing_bucket_is_an_outage_that_says_so(s3: S3Client) -> None:
    store = S3Store("no-such-bucket", client=s3)
    for call in (store.ping, lambda: store.get("k"), lambda: list(store.list()), lambda: store.put("k", b"")):
        with pytest.raises(StoreOutage, match="INFERQ_STORE_URL"):
            call()


def test_missing_credentials_are_an_outage(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    store = S3Store("bucket", endpoint_url=s3_url)
    with pytest.raises(StoreOutage, match="AWS_ACCESS_KEY_ID") as caught:
        store.get("k")
    assert isinstance(caught.value.__cause__, NoCredentialsError)


def test_another_programs_objects_are_left_out_of_a_listing(s3: S3Client, bucket: str) -> None:
    store = S3Store(bucket, "mine", client=s3)
    for name in ("mine/", "mine/a", "mine/b/", "mine//c", "mine-not/d", "other"):
        s3.put_object(Bucket=bucket, Key=name, Body=b"")
    assert [info.key for info in store.list()] == ["a"]
    with pytest.raises(ObjectNotFound):
        store.get("c")


def test_the_client_is_made_once_for_all_threads(
    s3_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str | None] = []
    real = s3_module.s3_client

    def make(url: str | None) -> S3Client:
        made.append(url)
        return real(url)

    monkeypatch.setattr(s3_module, "s3_client", make)
    store = S3Store(bucket, endpoint_url=s3_url)
    threads = [threading.Thread(target=store.ping) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [s3_url]
