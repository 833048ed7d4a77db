"""Serves /healthz, /readyz and /metrics on a thread of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from inferq.schemas import InstallationError


@dataclass(frozen=True)
class Readiness:
    """Whether the process is ready, and if not, what it waits for."""

    ready: bool
    waiting_for: tuple[str, ...] = ()


class ProbeServer:
    """Serves the probes at `host`:`port`. Port 0 chooses a free one; see the attribute `port`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        healthy: Callable[[], bool],
        readiness: Callable[[], Readiness],
        registry: CollectorRegistry,
    ) -> None:
        metrics = make_wsgi_app(registry)

        def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            match environ.get("PATH_INFO"):
                case "/metrics":
                    exposition: Iterable[bytes] = metrics(environ, start_response)
                    return exposition
                case "/healthz":
                    alive = healthy()
                    return _json(start_response, alive, {"healthy": alive})
                case "/readyz":
                    state = readiness()
                    content = {"ready": state.ready, "waiting_for": state.waiting_for}
                    return _json(start_response, state.ready, content)
                case _:
                    start_response("404 Not Found", [("Content-Type", "text/plain")])
                    return [b"There are /healthz, /readyz and /metrics.\n"]

        try:
            self._server = make_server(host, port, answer, WSGIServer, _QuietHandler)
        except OSError as error:
            raise InstallationError(
                f"cannot serve the probes at {host}:{port} ({error.strerror}); set INFERQ_PROBE_PORT"
            ) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _QuietHandler(WSGIRequestHandler):
    timeout = 5  # a silent client must not block the next one

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:  # noqa: ARG002
        return  # probes come every few seconds


def _json(start_response: StartResponse, good: bool, content: object) -> Iterable[bytes]:
    start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "application/json")])
    return [json.dumps(content).encode() + b"\n"]
