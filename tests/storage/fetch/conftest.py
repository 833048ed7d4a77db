"""A raw HTTP server, and fetches from it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from inferq.schemas import InferqError, InvalidTask, TransientFailure
from inferq.storage import Fetched, Fetcher, StorageSettings
from inferq.storage.objects.local import LocalStore

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
