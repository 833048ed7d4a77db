"""Servers that drip, hang, or send too much end within their limits."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from inferq.storage.fetch.addresses import Pace
from tests.storage.fetch.conftest import Answer, Fetch, Server, failed, refused


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
