"""Redirects, names, addresses and certificates: a fetch reaches no server that it must not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from inferq.schemas import InvalidTask, TransientFailure
from inferq.storage.fetch.addresses import system_resolver
from tests.certificates import certificate
from tests.storage.fetch.conftest import Fetch, Server, failed, refused


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
