"""/healthz and /readyz of beat, on a thread of their own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from inferq.producer.nightly.beat import BeatState
from inferq.schemas import InstallationError


def serve_probes(host: str, port: int, state: Callable[[], BeatState]) -> int:
    """Serve the probes until the process ends; gives the port. A `port` of 0 takes a free one.

    Raises InstallationError if it cannot listen there.
    """

    class Probes(BaseHTTPRequestHandler):
        timeout = 5  # a silent caller must not hold a thread

        def do_GET(self) -> None:
            match self.path:
                case "/healthz":
                    self._answer(200, {"healthy": True})
                case "/readyz":
                    now = state()
                    self._answer(
                        200 if now.ready else 503, {"ready": now.ready, "waiting_for": now.waiting_for}
                    )
                case _:
                    self._answer(404, {"there_are": ["/healthz", "/readyz"]})

        def _answer(self, code: int, content: object) -> None:
            body = json.dumps(content).encode() + b"\n"
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002, ARG002
            return  # probes come every few seconds

    try:
        server = ThreadingHTTPServer((host, port), Probes)
    except OSError as error:
        raise InstallationError(
            f"the probes cannot be served at {host}:{port} ({error.strerror}); set INFERQ_PROBE_PORT"
        ) from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="probes", daemon=True).start()
    return int(server.server_port)
