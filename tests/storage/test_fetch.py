"""Fetching inputs from servers that fail in every way, and from URLs that mean harm."""

from __future__ import annotations

import gzip
import hashlib
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from inferq.schemas import InferqError, InvalidTask, TransientFailure
from inferq.storage import Fetched, Fetcher, ScratchUnavailable, StorageSettings, StoreOutage, upload_key
from inferq.storage.fetch.addresses import Pace, system_resolver
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.s3 import S3Store
from tests.certificates import certificate
from tests.waiting import eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
Answer = bytes | Callable[[socket.socket], None]


class Server:
    """A raw HTTP server: each path has the bytes of its answer, or a function that sends them."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[bytes] = []
        self.connections = 0
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{'https' if self._context else 'http'}://{host}:{self.port}{path}"

    def ok(self, path: str, body: bytes, *headers: str) -> None:
        head = "".join(f"{header}\r\n" for header in headers)
        self.answers[path] = f"HTTP/1.1 200 OK\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def status(self, path: str, status: int, *headers: str) -> None:
        head = "".join(f"{header}\r\n" for header in headers)
        self.answers[path] = f"HTTP/1.1 {status} Status\r\n{head}Content-Length: 0\r\n\r\n".encode()

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.status(path, status, f"Location: {to}")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            with connection:
                while request := self._request(connection):
                    self.requests.append(request)
                    answer = self.answers[request.split()[1].decode()]
                    if callable(answer):
                        answer(connection)
                        return
                    connection.sendall(answer)
        except OSError:
            pass
        finally:
            connection.close()

    @staticmethod
    def _request(connection: socket.socket) -> bytes:
        request = b""
        while b"\r\n\r\n" not in request:
            piece = connection.recv(65536)
            if not piece:
                return b""
            request += piece
        return request

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


Fetch = Callable[..., Fetched]


@pytest.fixture
def make_fetch(local_store: LocalStore, scratch: Path) -> Iterator[Callable[..., Fetch]]:
    """Builds a `fetch(url)` with the given settings and outside world."""
    made: list[Fetcher] = []

    def make(store: Any = local_store, *, world: dict[str, Any] | None = None, **settings: Any) -> Fetch:
        fetcher = Fetcher(
            store, StorageSettings(**{"fetch_allowed_networks": LOOPBACK, **settings}), **(world or {})
        )
        made.append(fetcher)

        def fetch(url: str, tenant: str = "acme", checkpoint: Callable[[], None] | None = None) -> Fetched:
            return fetcher.fetch(url, scratch, "image_url", tenant=tenant, checkpoint=checkpoint)

        return fetch

    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture
def fetch(make_fetch: Callable[..., Fetch]) -> Fetch:
    return make_fetch()


def refused(fetch: Fetch, url: str, code: str, kind: type[InferqError] = InvalidTask, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        fetch(url, **more)
    assert caught.value.code == code, caught.value
    assert str(caught.value).startswith("image_url ")
    return str(caught.value)


def failed(fetch: Fetch, url: str) -> str:
    return refused(fetch, url, "download_failed", TransientFailure)


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


@pytest.mark.parametrize("drip", ["headers", "body", "chunks", "nothing"])
def test_a_server_that_drips_is_cut_off_by_the_time_limit(
    make_fetch: Callable[..., Fetch], server: Server, drip: str, scratch: Path
) -> None:
    def send(connection: socket.socket) -> None:
        if drip == "nothing":
            connection.recv(1)
            return
        if drip == "body":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        if drip == "chunks":
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = {"headers": b"X", "body": b"x", "chunks": b"1\r\nx\r\n"}[drip]
        while True:
            connection.sendall(piece)
            time.sleep(0.02)

    server.answers["/"] = send
    fetch = make_fetch(fetch_timeout=0.4)
    assert "0.4 s" in failed(fetch, server.url())
    assert list(scratch.iterdir()) == []


def test_a_server_that_sends_too_little_is_cut_off_early(
    make_fetch: Callable[..., Fetch], server: Server
) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)

    fetch = make_fetch(world={"pace": Pace(patience=0.2, look=0.05)})
    server.answers["/"] = drip
    began = time.monotonic()
    assert "1024 bytes per second" in failed(fetch, server.url())
    assert time.monotonic() - began < 10  # the time limit is two minutes


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n" * 500]
)
def test_a_fetch_that_waits_for_a_server_can_be_given_up(
    make_fetch: Callable[..., Fetch], server: Server, answer: bytes
) -> None:
    class GivenUp(Exception):
        pass

    ends = time.monotonic() + 0.4

    def checkpoint() -> None:
        if time.monotonic() > ends:
            raise GivenUp

    def send(connection: socket.socket) -> None:
        while answer:
            connection.sendall(answer)
            time.sleep(0.05)
        connection.recv(1)

    fetch = make_fetch(world={"pace": Pace(look=0.05)})
    server.answers["/"] = send
    with pytest.raises(GivenUp):
        fetch(server.url(), checkpoint=checkpoint)
    assert time.monotonic() < ends + 10


def test_endless_interim_answers_are_cut_off(fetch: Fetch, server: Server) -> None:
    def send(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 2000)

    server.answers["/"] = send
    assert "head has more than" in failed(fetch, server.url())


def test_the_time_limit_covers_all_redirects_together(
    make_fetch: Callable[..., Fetch], server: Server
) -> None:
    def slowly(to: str) -> Answer:
        def send(connection: socket.socket) -> None:
            time.sleep(0.2)
            connection.sendall(f"HTTP/1.1 302 F\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())

        return send

    for number in range(5):
        server.answers[f"/{number}"] = slowly(f"/{number + 1}")
    server.ok("/5", b"x")
    failed(make_fetch(fetch_timeout=0.5), server.url("/0"))


def test_a_server_that_does_not_answer_tls_is_cut_off(
    make_fetch: Callable[..., Fetch], server: Server
) -> None:
    assert "0.3 s" in failed(make_fetch(fetch_timeout=0.3), server.url().replace("http:", "https:"))


def test_a_resolver_that_hangs_is_cut_off(make_fetch: Callable[..., Fetch]) -> None:
    leave = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        leave.wait()
        return ["127.0.0.1"]

    try:
        said = failed(make_fetch(world={"resolver": hang}, fetch_timeout=0.3), "http://slow.example/")
    finally:
        leave.set()
    assert "0.3 s" in said


@pytest.mark.parametrize("framing", ["length", "chunked", "close", "gzip"])
def test_what_is_too_large_is_cut_off(
    make_fetch: Callable[..., Fetch], server: Server, framing: str, scratch: Path
) -> None:
    body = b"x" * 2000
    if framing == "length":
        # Refused by what it says, though it never sends it.
        server.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"
    elif framing == "chunked":
        server.answers["/"] = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + body + b"\r\n0\r\n\r\n"
        )
    elif framing == "close":
        server.answers["/"] = lambda s: s.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + body)
    else:
        server.ok("/", gzip.compress(body), "Content-Encoding: gzip")
    message = refused(make_fetch(fetch_max_bytes=1000), server.url(), "input_too_large")
    assert "1000 bytes" in message
    assert list(scratch.iterdir()) == []


def test_the_largest_that_is_allowed_is_allowed(make_fetch: Callable[..., Fetch], server: Server) -> None:
    server.ok("/", b"x" * 1000)
    assert make_fetch(fetch_max_bytes=1000)(server.url()).bytes == 1000


def test_gzip_that_nobody_asked_for_is_unpacked(fetch: Fetch, server: Server) -> None:
    body = gzip.compress(b"first ") + gzip.compress(b"second" * 1000)
    server.ok("/", body, "Content-Encoding: gzip", "Content-Type: text/plain")
    fetched = fetch(server.url())
    assert fetched.path.read_bytes() == b"first " + b"second" * 1000


@pytest.mark.parametrize(
    "body", [gzip.compress(b"x" * 1000, mtime=0)[:-5], b"not gzip", gzip.compress(b"x", mtime=0) + b"rubbish"]
)
def test_broken_gzip_is_transient(fetch: Fetch, server: Server, body: bytes) -> None:
    server.ok("/", body, "Content-Encoding: gzip")
    failed(fetch, server.url())


def test_a_compression_bomb_is_cut_off_early(make_fetch: Callable[..., Fetch], server: Server) -> None:
    bomb = gzip.compress(bytes(200 << 20), 9)
    server.ok("/", bomb, "Content-Encoding: gzip")
    fetch = make_fetch(fetch_max_bytes=5 << 20)
    tracemalloc.start()
    try:
        refused(fetch, server.url(), "input_too_large")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_other_encodings_are_refused(fetch: Fetch, server: Server) -> None:
    server.ok("/", b"x", "Content-Encoding: br")
    assert "'br'" in refused(fetch, server.url(), "input_refused")


def test_a_large_file_takes_constant_memory(fetch: Fetch, server: Server) -> None:
    size = 64 << 20

    def send(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        block = bytes(1 << 16)
        for _ in range(size >> 16):
            connection.sendall(block)

    server.answers["/"] = send
    tracemalloc.start()
    try:
        assert fetch(server.url()).bytes == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(fetch: Fetch, server: Server, status: int) -> None:
    server.redirect("/a", "b/c d", status)
    server.ok("/b/c%20d", b"here")
    assert fetch(server.url("/a")).bytes == 4


def test_five_redirects_are_followed_and_no_more(fetch: Fetch, server: Server) -> None:
    for number in range(6):
        server.redirect(f"/{number}", f"/{number + 1}")
    server.ok("/6", b"x")
    assert fetch(server.url("/1")).bytes == 1
    assert "redirects" in refused(fetch, server.url("/0"), "input_refused")
    server.redirect("/loop", "/loop")
    refused(fetch, server.url("/loop"), "input_refused")


@pytest.mark.parametrize(
    "to",
    [
        "file:///etc/passwd",
        "s3://bucket/k",
        "data:,x",
        "inferq:abc",
        "ftp://h/",
        "gopher://h",
        "javascript:1",
    ],
)
def test_redirects_out_of_http_are_refused(fetch: Fetch, server: Server, to: str) -> None:
    server.redirect("/", to)
    refused(fetch, server.url(), "input_refused")


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("http://10.0.0.1/", "address_refused"),
        ("http://169.254.169.254/latest/meta-data", "address_refused"),
        ("//[fd00:ec2::254]/", "address_refused"),
        ("http://0x0a000001/", "address_refused"),
        ("http://h:0/", "bad_input_url"),
        ("http://[", "bad_input_url"),
        ("", "input_refused"),
    ],
)
def test_each_redirect_is_checked_anew(fetch: Fetch, server: Server, to: str, code: str) -> None:
    server.redirect("/", to)
    refused(fetch, server.url(), code)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "0", "0.0.0.0", "localhost",
        "LOCALHOST.", "127.0.0.1.", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "①②⑦.0.0.1",
        "169.254.169.254", "[fe80::1]", "user@127.0.0.1", "127.0.0.1:80",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused_however_they_are_written(
    make_fetch: Callable[..., Fetch], server: Server, host: str
) -> None:
    fetch = make_fetch(fetch_allowed_networks=())
    host = host if host.endswith(":80") else f"{host}:{server.port}"
    with pytest.raises((InvalidTask, TransientFailure)) as caught:
        fetch(f"http://{host}/")
    # Some resolvers know no short or dotted forms; what matters is that nothing is connected to.
    assert caught.value.code in {"address_refused", "download_failed"}
    assert server.connections == 0


class Liar:
    """A resolver that answers differently each time."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_an_answer_that_changes_after_the_check_changes_nothing(
    make_fetch: Callable[..., Fetch], server: Server
) -> None:
    server.ok("/", b"x")
    resolver = Liar(["127.0.0.1"], ["10.0.0.1"])
    fetch = make_fetch(world={"resolver": resolver})
    assert fetch(server.url(host="rebind.example")).bytes == 1
    assert resolver.asked == 1
    assert f"host: rebind.example:{server.port}".encode() in server.requests[0].lower()


def test_a_name_that_turns_private_is_refused_at_the_next_connection(
    make_fetch: Callable[..., Fetch], server: Server
) -> None:
    server.answers["/"] = lambda s: s.sendall(
        b"HTTP/1.1 302 F\r\nLocation: /again\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    server.ok("/again", b"secret")
    fetch = make_fetch(world={"resolver": Liar(["127.0.0.1"], ["10.0.0.1"])})
    refused(fetch, server.url(host="rebind.example"), "address_refused")
    assert len(server.requests) == 1


def test_private_addresses_among_public_ones_are_never_tried(
    make_fetch: Callable[..., Fetch], server: Server
) -> None:
    fetch = make_fetch(
        world={"resolver": Liar(["10.9.9.9", "127.0.0.1"])},
        fetch_allowed_networks=(ip_network("127.0.0.1/32"),),
    )
    server.ok("/", b"x")
    assert fetch(server.url(host="mixed.example")).bytes == 1


def test_a_dead_address_is_passed_over_for_the_next(make_fetch: Callable[..., Fetch], server: Server) -> None:
    server.ok("/", b"x")
    fetch = make_fetch(world={"resolver": Liar(["127.9.9.9", "127.0.0.1"])})
    assert fetch(server.url(host="two.example")).bytes == 1


@pytest.mark.parametrize(
    "error",
    [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), OSError("resolver away")],
)
def test_a_name_that_does_not_resolve_now_is_transient(
    make_fetch: Callable[..., Fetch], error: OSError
) -> None:
    def fail(host: str, port: int) -> list[str]:
        raise error

    assert "nowhere.example" in failed(make_fetch(world={"resolver": fail}), "http://nowhere.example/")


def test_a_name_without_an_address_is_refused_like_an_internal_one(make_fetch: Callable[..., Fetch]) -> None:
    """The difference would tell which internal names exist."""
    refused(make_fetch(world={"resolver": lambda h, p: []}), "http://nothing.example/", "address_refused")


def test_a_name_that_no_resolver_takes_is_invalid(make_fetch: Callable[..., Fetch]) -> None:
    refused(make_fetch(world={"resolver": system_resolver}), f"http://{'a' * 64}.example/", "bad_input_url")


def test_user_and_password_go_to_the_first_server_only(fetch: Fetch, server: Server) -> None:
    other = Server()
    try:
        server.redirect("/", "/same")
        server.redirect("/same", other.url("/other"))
        other.redirect("/other", server.url("/back", host="us:er@127.0.0.1"))
        server.ok("/back", b"x")
        fetch(server.url(host="user:secret@127.0.0.1"))
        sent = [b"authorization: basic dxnlcjpzzwnyzxq=" in r.lower() for r in server.requests]
        assert sent == [True, True, True]
        assert b"authorization" not in other.requests[0].lower()
    finally:
        other.close()


def test_secrets_of_a_url_stay_out_of_messages(fetch: Fetch, server: Server) -> None:
    server.status("/", 404)
    server.answers["/?X-Signature=SECRET"] = server.answers["/"]
    message = refused(
        fetch, server.url("/?X-Signature=SECRET#SECRET", host="me:SECRET@127.0.0.1"), "input_not_found"
    )
    assert "SECRET" not in message
    assert f"127.0.0.1:{server.port}/" in message
    server.redirect("/", "ftp://me:SECRET@h/?SECRET")
    assert "SECRET" not in refused(fetch, server.url(), "input_refused")


@pytest.fixture
def here() -> Callable[[str, int], list[str]]:
    return lambda host, port: ["127.0.0.1"]


def test_https_checks_the_name_of_the_url_though_it_connects_to_an_address(
    make_fetch: Callable[..., Fetch], tmp_path: Path, here: Any
) -> None:
    serving, trusting = certificate(tmp_path, "good.example")
    names: list[str | None] = []
    serving.sni_callback = lambda sock, name, context: names.append(name)
    server = Server(serving)
    try:
        server.ok("/", b"x")
        fetch = make_fetch(world={"resolver": here, "ssl_context": trusting})
        assert fetch(server.url(host="good.example.")).bytes == 1
        assert names == ["good.example"]
        assert "certificate" in refused(fetch, server.url(host="other.example"), "certificate_refused")
        untrusting = make_fetch(world={"resolver": here})
        assert "self" in refused(untrusting, server.url(host="good.example"), "certificate_refused")
        server.redirect("/down", "http://good.example/")
        assert "https" in refused(fetch, server.url("/down", host="good.example"), "input_refused")
        plain = Server()
        try:
            plain.redirect("/up", server.url(host="good.example"))
            assert fetch(plain.url("/up")).bytes == 1
        finally:
            plain.close()
    finally:
        server.close()


def test_an_expired_certificate_is_refused(
    make_fetch: Callable[..., Fetch], tmp_path: Path, here: Any
) -> None:
    serving, trusting = certificate(tmp_path, "old.example", expired=True)
    server = Server(serving)
    try:
        fetch = make_fetch(world={"resolver": here, "ssl_context": trusting})
        assert "expired" in refused(fetch, server.url(host="old.example"), "certificate_refused")
    finally:
        server.close()


def test_plain_http_behind_https_is_transient(fetch: Fetch, server: Server) -> None:
    server.answers["/"] = b""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(10)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        failed(fetch, f"https://127.0.0.1:{listener.getsockname()[1]}/")
    finally:
        thread.join()
        listener.close()


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
