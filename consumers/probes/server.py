"""Serves /healthz, /readyz and /metrics on threads of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from inferq.schemas.probe_server import ProbeListener


@dataclass(frozen=True)
class Health:
    """Whether the process makes progress: what hinders it for good, and for how many seconds each run goes on."""

    faults: tuple[str, ...] = ()
    running: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Readiness:
    """Whether the process is ready, and if not, what it waits for."""

    ready: bool
    waiting_for: tuple[str, ...] = ()


class ProbeServer(ProbeListener):
    """Serves the probes at `host`:`port`. Port 0 chooses a free one; see the attribute `port`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        health: Callable[[], Health],
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
                    now = health()
                    content = {"healthy": not now.faults, "faults": now.faults, "running": now.running}
                    return _json(start_response, not now.faults, content)
                case "/readyz":
                    state = readiness()
                    content = {"ready": state.ready, "waiting_for": state.waiting_for}
                    return _json(start_response, state.ready, content)
                case _:
                    start_response("404 Not Found", [("Content-Type", "text/plain")])
                    return [b"There are /healthz, /readyz and /metrics.\n"]

        super().__init__(host, port, answer)


def _json(start_response: StartResponse, good: bool, content: object) -> Iterable[bytes]:
    start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "application/json")])
    return [json.dumps(content).encode() + b"\n"]
