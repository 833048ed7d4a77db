"""S3 that fails on demand: a proxy before moto's server, which also records every record that is written."""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from inferq.producer.up.part import Part, free_ports, port_answers
from tests.chaos.ledger import Ledger
from tests.chaos.records import note_record

Mode = Literal[
    "pass",
    "error",
    "hang",
    "lose",
    "absent",
    "forbidden",
    "skewed",
    "unknown_key",
    "bad_signature",
    "expired",
]
"""What becomes of a request: served; answered 500; never answered; served without the answer coming back; answered
404 or 403 by a proxy in front of S3; refused for the clock, or for the credentials."""

_REFUSALS: dict[Mode, tuple[int, bytes]] = {
    "error": (500, b"<Error><Code>InternalError</Code></Error>"),
    "absent": (404, b"<html><body>404 page not found</body></html>"),
    "forbidden": (403, b"<html><body>403 Forbidden</body></html>"),
    "skewed": (403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>"),
    "unknown_key": (403, b"<Error><Code>InvalidAccessKeyId</Code></Error>"),
    "bad_signature": (403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"),
    "expired": (400, b"<Error><Code>ExpiredToken</Code></Error>"),
}

BUCKET = "results"
INPUTS = "inputs"
"""The bucket of inputs that tasks name by an `s3:` URL."""

_HOP_HEADERS = {"connection", "expect", "host", "keep-alive", "transfer-encoding"}
_HANG_SECONDS = 10.0

_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
server._thread.join()
"""


def moto() -> tuple[Part, int]:
    """A server that speaks S3, and its port."""
    (port,) = free_ports(1)
    part = Part(
        name="s3",
        argv=(sys.executable, "-c", _MOTO, str(port)),
        env=dict(os.environ),
        probe=lambda: port_answers(port),
    )
    return part, port


class FaultyS3:
    """Forwards a free loopback port to the server on `target_port`; `mode` says what it does instead.

    With `only_writes` the mode applies to writes, and reads are served. With `only_inputs` it applies to the
    bucket of inputs.
    """

    def __init__(self, target_port: int, ledger: Ledger) -> None:
        self.mode: Mode = "pass"
        self.only_writes = False
        self.only_inputs = False
        self._target_port = target_port
        self._ledger = ledger
        # moto looks for a key and then writes it, which two requests at once could both pass.
        self._writing = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.mode = "error"
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def log_message(self, *_arguments: Any) -> None:
                return

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy._serve(self, body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

        return Handler

    def _serve(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        mode = self.mode
        if self.only_writes and request.command != "PUT":
            mode = "pass"
        if self.only_inputs and not request.path.startswith(f"/{INPUTS}"):
            mode = "pass"
        if mode == "hang":
            end = time.monotonic() + _HANG_SECONDS
            while self.mode == "hang" and time.monotonic() < end:
                time.sleep(0.05)
            request.close_connection = True
            return
        if mode in _REFUSALS:
            status, answer = _REFUSALS[mode]
            _answer(request, status, [], b"" if request.command == "HEAD" else answer)
            return
        status, headers, answer = self._forward(request, body)
        if mode == "lose":
            request.close_connection = True
            return
        _answer(request, status, headers, answer)

    def _forward(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_HEADERS}
        line = http.client.HTTPConnection("127.0.0.1", self._target_port, timeout=30)
        try:
            if request.command != "PUT":
                return _exchange(line, request, body, headers)
            with self._writing:
                reply = _exchange(line, request, body, headers)
                if reply[0] == 200:
                    note_record(self._ledger, request.path.partition("?")[0], body, seen_by="s3")
                return reply
        finally:
            line.close()


def _exchange(
    line: http.client.HTTPConnection, request: BaseHTTPRequestHandler, body: bytes, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], bytes]:
    line.request(request.command, request.path, body=body or None, headers=headers)
    reply = line.getresponse()
    return reply.status, reply.getheaders(), reply.read()


def _answer(
    request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes
) -> None:
    with suppress(OSError):
        request.send_response(status)
        length = None
        for name, value in headers:
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in {*_HOP_HEADERS, "date", "server"}:
                request.send_header(name, value)
        # The answer to HEAD names the length of a body that it does not carry.
        request.send_header(
            "Content-Length", length if length and request.command == "HEAD" else str(len(body))
        )
        request.end_headers()
        request.wfile.write(body)
