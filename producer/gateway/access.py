"""Around every request: its log line, metrics and span, the headers of every answer, and the path prefix."""

from __future__ import annotations

import logging
import time
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from inferq.producer.gateway.metrics import Metrics
from inferq.schemas import tracing
from inferq.schemas.logs import fields
from inferq.schemas.trace_context import TraceContext, trace_context
from inferq.schemas.tracing import NO_SPAN, Span

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_ID_CHARACTERS = 255
_TRACED = frozenset({"POST", "PUT", "DELETE", "PATCH"})
"""Methods that change something. Clients poll by GET, which says nothing of a task's way."""

_log = logging.getLogger("inferq.access")


class Access:
    """ASGI middleware. Its line has the route's template: a path may hold the name of a file, a query a signature.

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
        status, sent = 500, 0
        clear_contextvars()

        async def send_with_headers(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            given = trace_context(Headers(scope=scope))
            with _span_of(scope, given) as span:
                trace = span.context or given
                bind_contextvars(trace_id=trace and trace.trace_id)
                await self._app(scope, receive, send_with_headers)
                _describe(span, scope, status)
        finally:
            seconds = time.perf_counter() - begun
            # An unknown method or path must not create a new time series.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(method, route).observe(seconds)
            _log_request(scope, method, route, status, seconds, sent)


def _log_request(scope: Scope, method: str, route: str, status: int, seconds: float, sent: int) -> None:
    """One line; its tenant, and the task of a submission, are bound already."""
    named = scope.get("path_params", {})
    bind_contextvars(
        **{name: str(named[name])[:_ID_CHARACTERS] for name in ("task_id", "batch_id") if name in named}
    )
    more = fields(
        key_id=scope.get("state", {}).get("key_id"),
        client=_address(scope),
        method=method,
        route=route,
        status=status,
        seconds=round(seconds, 4),
        bytes=sent,
    )
    # Probes come every few seconds.
    level = logging.DEBUG if route in _PROBES else logging.INFO
    _log.log(level, "%s %s %d", method, route, status, extra=more)


def _address(scope: Scope) -> str | None:
    """The client's address. What a trusted proxy passes on as one may be any text."""
    client = scope.get("client")
    try:
        return str(ip_address(client[0])).partition("%")[0] if client else None
    except ValueError:
        return None


def _span_of(scope: Scope, parent: TraceContext | None) -> Span:
    """The span of a request, by https://opentelemetry.io/docs/specs/semconv/http/http-spans/"""
    if not tracing.on() or scope["method"] not in _TRACED:
        return NO_SPAN
    return tracing.span(
        scope["method"],
        "server",
        parent=parent,
        attributes=lambda: {"http.request.method": scope["method"], "url.scheme": scope["scheme"]},
    )


def _describe(span: Span, scope: Scope, status: int) -> None:
    """Say in the span what is known at its end: the path holds ids, so the span is named after the route."""
    if not span.recording:
        return
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.rename(f"{scope['method']} {route}")
    span.set("http.route", route)
    span.set("http.response.status_code", status)
    span.set("inferq.tenant", scope.get("state", {}).get("tenant"))
    if status >= 500:
        span.fail(str(status))
