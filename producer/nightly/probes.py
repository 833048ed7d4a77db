"""/healthz and /readyz of beat, on threads of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from wsgiref.types import StartResponse, WSGIEnvironment

from inferq.producer.nightly.beat import BeatState
from inferq.schemas.probe_server import ProbeListener


def serve_probes(host: str, port: int, state: Callable[[], BeatState]) -> int:
    """Serve the probes until the process ends; gives the port. A `port` of 0 takes a free one.

    Raises InstallationError if it cannot listen there.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/healthz":
                status, content = "200 OK", dict[str, object](healthy=True)
            case "/readyz":
                now = state()
                status = "200 OK" if now.ready else "503 Service Unavailable"
                content = {"ready": now.ready, "waiting_for": now.waiting_for}
            case _:
                status, content = "404 Not Found", {"there_are": ["/healthz", "/readyz"]}
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode() + b"\n"]

    listener = ProbeListener(host, port, answer)
    listener.start()
    return listener.port
