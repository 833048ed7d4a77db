"""What only S3 does: lost answers, conflicts, refusals. A stubbed service stands in for its rare moods."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import botocore.endpoint
import pytest
from botocore.exceptions import NoCredentialsError

from inferq.schemas import Outage, TransientFailure
from inferq.storage import Fetched, Fetcher, LocalStore, ObjectNotFound, StorageSettings, StoreOutage
from inferq.storage.objects import s3 as s3_module
from inferq.storage.objects import store as store_module
from inferq.storage.objects.s3 import CredentialsRefused, S3Refused, S3Store
from tests.certificates import certificate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Moody:
    """Answers each request by the next of `answers`: (status, S3 error code, `<html>` or headers)."""

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
                    error = f"<Error><Code>{what}</Code><Message>m</Message></Error>"
                    body = (what if what.startswith("<") else error).encode()
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
    impatient = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
    monkeypatch.setattr(botocore.endpoint, "time", impatient)
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


def test_many_are_created_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    store, together = S3Store("bucket"), threading.Barrier(16)

    def create(key: str, data: bytes, *, content_type: str) -> bool:
        together.wait(10)  # passes only with 16 at once
        return key != "3"

    monkeypatch.setattr(store, "create", create)
    created = store.create_many([(str(number), b"") for number in range(32)], content_type="text/plain")
    assert list(created) == [number != 3 for number in range(32)]


def test_when_one_of_many_fails_none_is_still_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    store, in_progress, waited_for = S3Store("bucket"), set(), threading.Event()

    def create(key: str, data: bytes, *, content_type: str) -> bool:
        in_progress.add(key)
        if key != "0":
            assert waited_for.wait(10)
        in_progress.remove(key)
        if key == "0":
            raise StoreOutage("away")
        return True

    def wait(futures: Sequence[Future[bool]]) -> object:
        waited_for.set()
        return concurrent.futures.wait(futures)

    monkeypatch.setattr(store, "create", create)
    monkeypatch.setattr(store_module, "wait", wait)
    with pytest.raises(StoreOutage, match="away"):
        store.create_many([(str(number), b"") for number in range(40)], content_type="text/plain")
    assert in_progress == set()


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


def test_a_refusal_names_the_rights_that_are_needed(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(403, "AccessDenied")]
    with pytest.raises(S3Refused, match=r"AccessDenied.*s3:GetObject.*s3:ListBucket"):
        moody_store.get("k")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "RequestTimeTooSkewed"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (400, "ExpiredToken"),
    ],
)
def test_refused_credentials_say_so_with_the_code_of_s3(
    moody: Moody, moody_store: S3Store, status: int, code: str
) -> None:
    # The answer to HEAD has no body: GET is asked for the code.
    moody.answers = [(status, code)] * 4  # after a HEAD with 400, botocore looks for the bucket's region
    for call in (moody_store.get, moody_store.stat):
        with pytest.raises(CredentialsRefused, match=rf"{code}.*AWS_ACCESS_KEY_ID"):
            call("k")
    assert [moody.requests[n][0] for n in (0, 1, -1)] == ["GET", "HEAD", "GET"]


CALLS: dict[str, Callable[[S3Store], object]] = {
    "get": lambda store: store.get("k"),
    "stream": lambda store: store.stream("k"),
    "stat": lambda store: store.stat("k"),
    "list": lambda store: list(store.list("k")),
    "put": lambda store: store.put("k", b""),
    "create": lambda store: store.create("k", b"", content_type="text/plain"),
    "create many": lambda store: store.create_many([("k", b"")], content_type="text/plain"),
    "delete": lambda store: store.delete("k"),
    "ping": lambda store: store.ping(),
}


@pytest.mark.parametrize("body", ["<html><body>404</body></html>", "NoSuchUpload"])
def test_a_404_that_is_not_s3s_own_is_an_outage(moody: Moody, moody_store: S3Store, body: str) -> None:
    for name, call in CALLS.items():
        moody.answers = [(404, body)] * 2
        with pytest.raises(StoreOutage, match="404"):
            call(moody_store)
            pytest.fail(name)


def test_only_who_asks_for_an_object_can_learn_that_it_is_absent(moody: Moody, moody_store: S3Store) -> None:
    for name in ("list", "put", "create", "ping"):
        moody.answers = [(404, "NoSuchKey")]
        with pytest.raises(StoreOutage, match="NoSuchKey"):
            CALLS[name](moody_store)


def test_an_absent_object_is_absent_by_the_code_of_s3(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(404, "NoSuchKey")] * 4
    for call in (CALLS["get"], CALLS["stream"], CALLS["stat"]):
        with pytest.raises(ObjectNotFound):
            call(moody_store)


def fetched(moody: Moody, folder: Path) -> Fetched:
    settings = StorageSettings(s3_endpoint_url=moody.url, fetch_s3_buckets=("scans",))
    fetcher = Fetcher(LocalStore(folder / "store"), settings)
    return fetcher.fetch("s3://scans/in/1.txt", folder, "text_url", tenant="default")


def test_an_input_is_not_blamed_for_the_credentials_and_the_clock_of_the_worker(
    moody: Moody, tmp_path: Path
) -> None:
    for code in ("RequestTimeTooSkewed", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        moody.answers = [(403, code)] * 2
        with pytest.raises(Outage, match=code):
            fetched(moody, tmp_path)


def test_an_input_is_fetched_though_its_credentials_were_refused_a_moment_before(
    moody: Moody, tmp_path: Path
) -> None:
    moody.answers = [(403, "InvalidAccessKeyId"), (200, "<ListBucketResult/>"), (200, _HEAD)]
    assert fetched(moody, tmp_path).bytes == 0


_UNSIGNED = (403, "SignatureDoesNotMatch")


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(403, "AccessDenied")], "AccessDenied"),
        ([(404, "NoSuchBucket")], "NoSuchBucket"),
        ([(404, "<html>404</html>")], "404"),
        ([(403, "<html>403</html>")], "403"),
        # A proxy that rewrites this key: S3 takes any other request.
        ([_UNSIGNED, (200, "<ListBucketResult/>"), _UNSIGNED], "SignatureDoesNotMatch"),
        ([_UNSIGNED, (403, "AccessDenied"), _UNSIGNED], "SignatureDoesNotMatch"),
    ],
)
def test_an_input_that_s3_refuses_is_tried_again_later(
    moody: Moody, tmp_path: Path, answers: list[tuple[int, str | dict[str, str]]], says: str
) -> None:
    moody.answers = answers
    with pytest.raises(TransientFailure, match=says) as caught:
        fetched(moody, tmp_path)
    assert caught.value.code == "download_failed"


def test_a_store_that_replaces_what_was_to_be_written_once_is_not_used(
    moody: Moody, moody_store: S3Store
) -> None:
    written = (200, {"etag": '"e"'})
    moody.answers = [written, written]
    with pytest.raises(StoreOutage, match="If-None-Match") as caught:
        moody_store.ping()
    assert caught.value.code == "store_overwrites"
    moody.answers = [written, (412, "PreconditionFailed"), written]
    moody_store.ping()
    assert moody.answers == []


def test_a_store_without_conditional_writes_is_not_used(moody: Moody, moody_store: S3Store) -> None:
    moody.answers = [(501, "NotImplemented")]
    with pytest.raises(StoreOutage, match="NotImplemented"):
        moody_store.ping()


def test_credentials_that_only_read_are_not_enough(moody: Moody, moody_store: S3Store) -> None:
    for before in ([], [(412, "PreconditionFailed")]):  # some services look at the condition first
        moody.answers = [*before, (403, "AccessDenied")]
        with pytest.raises(S3Refused, match=r"AccessDenied.*s3:PutObject") as caught:
            moody_store.ping()
        assert caught.value.code == "store_refused"


def test_that_a_store_writes_is_proven_again_after_a_while(moody: Moody) -> None:
    now = 1000.0
    store = S3Store("bucket", endpoint_url=moody.url, clock=lambda: now)
    written, refused, listed = (
        (200, {"etag": '"e"'}),
        (412, "PreconditionFailed"),
        (200, "<ListBucketResult/>"),
    )
    moody.answers = [refused, written, listed, refused, written]
    store.ping()
    now += 29
    store.ping()
    assert len(moody.answers) == 2
    now += 2
    store.ping()
    assert [method for method, _ in moody.requests] == ["PUT", "PUT", "GET", "PUT", "PUT"]


def test_a_private_ca_is_named_by_the_bundle_of_aws(
    moody: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, _ = certificate(tmp_path, "localhost")
    moody.server.socket = serving.wrap_socket(moody.server.socket, server_side=True)
    address = moody.url.replace("http://127.0.0.1", "https://localhost")
    moody.answers = [(404, "NoSuchKey")]
    with pytest.raises(StoreOutage, match="certificate verify failed"):
        S3Store("bucket", endpoint_url=address).get("k")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "localhost.pem"))
    with pytest.raises(ObjectNotFound):
        S3Store("bucket", endpoint_url=address).get("k")


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
