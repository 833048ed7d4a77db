"""Around every request: a line in the access log, metrics, the headers of every answer, and the path prefix."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferq.producer.gateway.metrics import Metrics

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})

_log = logging.getLogger("inferq.access")


class Access:
    """ASGI middleware. It logs paths without their query, which may hold a signature.

    `root_path` is the path below which a proxy serves the gateway. Proxies strip it from a request's path or
    keep it; Starlette routes both.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, root_path: str) -> None:
        self._app = app
        self._metrics = metrics
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path
        begun = time.perf_counter()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - begun
            # An unknown method or path must not create a new time series.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(method, route).observe(seconds)
            tenant = scope.get("state", {}).get("tenant", "-")
            _log.info("%s %r %d %.1fms %s", scope["method"], scope["path"], status, seconds * 1e3, tenant)
