"""Sockets that listen, and an HTTP server for probes: /healthz, /readyz and /metrics of any process."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from inferq.schemas.errors import InstallationError

REQUEST_SECONDS = 5.0
"""How long a connection may last, from its first byte to its last. Kubernetes itself waits a second."""

_MOST_CONNECTIONS = 32
_BACKLOG = 128
_PAUSE_SECONDS = 0.1

_log = logging.getLogger(__name__)


def listen(host: str, port: int, *, what: str, settings: str, backlog: int = _BACKLOG) -> socket.socket:
    """A socket that listens on the address. `::` is every address, of IPv4 too.

    Raises InstallationError, which calls the listener `what` and names its `settings`.
    """
    every = ":" in host and not host.strip(":0")
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=backlog,
            dualstack_ipv6=every and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        shown = f"[{host}]" if ":" in host else host
        raise InstallationError(
            f"{what} cannot listen on {shown}:{port}: {error.strerror or error}; "
            f"free the port, or set {settings}",
            code="cannot_listen",
        ) from error


@dataclass(frozen=True)
class Health:
    """Whether the process makes progress.

    `faults`: why it makes none. `running`: seconds of each run in progress.
    """

    faults: tuple[str, ...] = ()
    running: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Readiness:
    """Whether the process is ready, and what it waits for. A worker may be ready and wait.

    `notes`: what else a person should know.
    """

    ready: bool
    waiting_for: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ProbeServer:
    """Serves the probes, on threads of its own.

    Each connection ends after `seconds`, whatever its client does. If there are too many, the oldest ends: a
    probe that is answered at once always finds room.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        readiness: Callable[[], Readiness],
        health: Callable[[], Health] = Health,
        metrics: WSGIApplication | None = None,
        seconds: float = REQUEST_SECONDS,
    ) -> None:
        """Listen at `host`:`port`; port 0 chooses a free one, see `port`. Raises InstallationError."""
        listener = listen(host, port, what="the probes", settings="INFERQ_PROBE_HOST and INFERQ_PROBE_PORT")
        self._server = _Server(listener, _reads_only(_probes(readiness, health, metrics)), seconds)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _probes(
    readiness: Callable[[], Readiness], health: Callable[[], Health], metrics: WSGIApplication | None
) -> WSGIApplication:
    paths = "/healthz and /readyz" if metrics is None else "/healthz, /readyz and /metrics"

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics" if metrics is not None:
                return metrics(environ, start_response)
            case "/healthz":
                now = health()
                good = not now.faults
                content: dict[str, object] = {"healthy": good, "faults": now.faults, "running": now.running}
            case "/readyz":
                state = readiness()
                good, content = state.ready, {"ready": state.ready, "waiting_for": state.waiting_for}
                if state.notes:
                    content["notes"] = state.notes
            case _:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [f"There are {paths}.\n".encode()]
        status = "200 OK" if good else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode() + b"\n"]

    return answer


def _reads_only(application: WSGIApplication) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["REQUEST_METHOD"]:
            case "GET":
                return application(environ, start_response)
            case "HEAD":
                application(environ, start_response)
                return []
            case _:
                start_response("405 Method Not Allowed", [("Allow", "GET, HEAD")])
                return []

    return answer


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        _log.debug("probe: " + format, *args)  # probes come every few seconds


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, application: WSGIApplication, seconds: float) -> None:
        self.seconds = seconds
        host, port = listener.getsockname()[:2]
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = host, port
        self.setup_environ()
        self.set_app(application)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}

    def get_request(self) -> tuple[Any, Any]:
        try:
            connection, address = super().get_request()
        except OSError:
            time.sleep(_PAUSE_SECONDS)  # no descriptor is free: the connection stays in the queue
            raise
        connection.settimeout(self.seconds)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = time.monotonic()
        self._end(len(self._open) - _MOST_CONNECTIONS)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that are over their time; the server's loop calls this twice a second."""
        over = time.monotonic() - self.seconds
        self._end(sum(began < over for began in self._open.copy().values()))

    def _end(self, count: int) -> None:
        """End the `count` oldest connections. Their threads notice that as the end of their input."""
        with self._lock:
            for each in list(self._open)[: max(0, count)]:
                del self._open[each]
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        _log.debug("a probe failed", exc_info=True)
