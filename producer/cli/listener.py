"""A small receiver of callbacks, for development: it verifies each signature and passes the callback on."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError
from standardwebhooks.webhooks import EmptyWebhookSecretError

from inferq.schemas import InferqError, InstallationError

_MAX_BYTES = 1 << 20
_IDLE_SECONDS = 30


@dataclass(frozen=True)
class Heard:
    """A received callback. `fault` says why its signature is invalid; None if it is valid."""

    webhook_id: str
    type: str
    subject_id: str
    sequence: int | None
    fault: str | None
    answered: int
    body: Any

    @property
    def verified(self) -> bool:
        return self.fault is None


def fault_of(body: bytes, headers: dict[str, str], secrets: Sequence[str]) -> str | None:
    """Why the signature is invalid; None if one of the secrets made it."""
    if not secrets:
        return "no secret to verify it with"
    faults = []
    for secret in secrets:
        try:
            Webhook(secret).verify(body, headers, json_parse=False)
        except (WebhookVerificationError, ValueError) as error:
            # The library raises ValueError for malformed headers.
            faults.append(str(error) or "its signature cannot be read")
        else:
            return None
    return faults[0]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a connection that breaks: the sender of a callback sends it again."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Listener:
    """Listens at `host`:`port`; port 0 takes a free one. It calls `heard` for each callback, on its thread.

    It answers the first `fail` callbacks with `status`, and those with an invalid signature with 401. Raises
    InstallationError if it cannot listen there.
    """

    def __init__(
        self,
        heard: Callable[[Heard], None],
        *,
        secrets: Callable[[], Sequence[str]],
        host: str = "127.0.0.1",
        port: int = 0,
        fail: int = 0,
        status: int = 500,
    ) -> None:
        numbers = itertools.count()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _IDLE_SECONDS

            def do_POST(self) -> None:
                length = self.headers.get("content-length", "")
                if not length.isascii() or not length.isdigit() or int(length) > _MAX_BYTES:
                    self.close_connection = True
                    self._answer(413 if length.isdigit() else 411)
                    return
                body = self.rfile.read(int(length))
                if len(body) < int(length):  # its sender broke off, and will send it again
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                fault = fault_of(body, headers, secrets())
                answer = 401 if fault else status if next(numbers) < fail else 204
                heard(_heard(body, headers, fault, answer))
                self._answer(answer)

            def do_GET(self) -> None:
                self._answer(405)

            def _answer(self, code: int) -> None:
                self.send_response(code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_about: object) -> None:
                return

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise InstallationError(
                f"cannot listen at {host}:{port}: {error.strerror}; choose another --port (0: a free one)"
            ) from error
        self._host = host
        self.port = int(self._server.server_address[1])

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self._host in ("0.0.0.0", "") else self._host  # noqa: S104 - compared, not bound
        return f"http://{host}:{self.port}/"

    def serve(self) -> None:
        """Listen until another thread calls `close`, or an exception such as Ctrl-C ends it."""
        self._server.serve_forever(0.1)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _heard(body: bytes, headers: dict[str, str], fault: str | None, answered: int) -> Heard:
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    event = content if isinstance(content, dict) else {}
    data = event.get("data")
    data = data if isinstance(data, dict) else {}
    sequence = data.get("sequence")
    return Heard(
        webhook_id=headers.get("webhook-id", ""),
        type=str(event.get("type", "?")),
        subject_id=str(data.get("task_id") or data.get("batch_id") or data.get("run_id") or "?"),
        sequence=sequence if isinstance(sequence, int) else None,
        fault=fault,
        answered=answered,
        body=content,
    )


def check_secret(secret: str) -> str:
    """Give the secret back. Raises InferqError (`bad_secret`) if it is malformed."""
    try:
        Webhook(secret)
    except (ValueError, RuntimeError, EmptyWebhookSecretError) as error:
        raise InferqError(
            "a secret must be whsec_ and base64; to print a valid one: inferq secrets show", code="bad_secret"
        ) from error
    return secret
