"""Records spans with OpenTelemetry's SDK and exports them over OTLP. Imported only while tracing is on."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from inferq.schemas.errors import InferqError, InstallationError
from inferq.schemas.trace_context import TraceContext
from inferq.schemas.tracing import NO_SPAN, Attributes, Kind, Span, Value

_FLUSH_SECONDS = 3.0
"""How long the end of a process waits for the last spans to be exported."""

_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_MAX_QUEUE = "OTEL_BSP_MAX_QUEUE_SIZE"
_DEFAULT_MAX_QUEUE = 2048

_KINDS: Mapping[Kind, trace.SpanKind] = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "producer": trace.SpanKind.PRODUCER,
    "consumer": trace.SpanKind.CONSUMER,
}
_PROPAGATOR = TraceContextTextMapPropagator()

_log = logging.getLogger(__name__)


def check_settings(endpoint: str) -> None:
    """Raise InstallationError for an endpoint or a protocol that cannot work. `endpoint` names the variable."""
    for name in _PROTOCOLS:
        protocol = os.environ.get(name, "").strip()
        if protocol and protocol != "http/protobuf":
            raise InstallationError(
                f"{name} is {protocol!r}, and inferq exports traces by http/protobuf alone: unset it, and let "
                f"{endpoint} name the collector's port for HTTP (4318 by default)",
                code="bad_settings",
            )
    try:
        parts = urlsplit(os.environ[endpoint].strip())
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good:
        raise InstallationError(
            f"{endpoint} is no HTTP URL: give http://host:4318 or https://host", code="bad_settings"
        )


class Recorder:
    """Records the spans of one process. `dropped` counts those that were not exported."""

    def __init__(self, part: str) -> None:
        attributes: dict[str, Any] = {"service.version": version("inferq")}
        named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        if not (named or os.environ.get("OTEL_SERVICE_NAME")):
            attributes["service.name"] = f"inferq-{part}"
        try:
            self._exports = _Exports()
            # Not at exit: it would wait for a collector that hangs.
            provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
            provider.add_span_processor(self._exports)
        except ValueError as error:
            raise InstallationError(f"a variable OTEL_* is wrong: {error}", code="bad_settings") from error
        self._provider = provider
        self._follows_parents = isinstance(provider.sampler, ParentBased)
        self._tracer = provider.get_tracer("inferq", version("inferq"))

    @property
    def dropped(self) -> int:
        return self._exports.dropped

    def span(
        self,
        name: str,
        kind: Kind,
        parent: TraceContext | None,
        link: TraceContext | None,
        attributes: Attributes | None,
    ) -> Span:
        """See `tracing.span`."""
        links: Sequence[trace.Link] = ()
        context = contexts.Context()
        if parent is not None:
            if self._follows_parents and not parent.sampled:
                return _Unsampled(parent)
            context = _remote(parent)
        elif link is not None:
            links = [trace.Link(trace.get_current_span(_remote(link)).get_span_context())]
        elif (surrounding := _current.get()) is not None:
            if surrounding.otel is None:
                return Span(
                    surrounding.context
                )  # samplers decide once for a trace, so this costs nothing more
            context = trace.set_span_in_context(surrounding.otel, context)
        span = self._tracer.start_span(
            name, context, _KINDS[kind], attributes() if attributes else None, links, record_exception=False
        )
        return _Recorded(span) if span.is_recording() else _Unsampled(_context_of(span))

    def current(self) -> Span:
        return _current.get() or NO_SPAN

    def close(self) -> None:
        """Export the last spans, at most for `_FLUSH_SECONDS`."""
        flush = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        flush.start()
        flush.join(_FLUSH_SECONDS)
        if lost := self._exports.unexported:
            _log.warning("%d spans were not exported", lost)


class _Block(Span):
    """The surrounding span of what happens in its block."""

    __slots__ = ("_token", "otel")

    def __init__(self, context: TraceContext, otel: trace.Span | None) -> None:
        super().__init__(context)
        self.otel = otel

    def __enter__(self) -> Span:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_raised: object) -> None:
        _current.reset(self._token)


_current: ContextVar[_Block | None] = ContextVar("inferq span", default=None)


class _Unsampled(_Block):
    """The first span of this process in a trace that is not recorded."""

    __slots__ = ()

    def __init__(self, context: TraceContext) -> None:
        super().__init__(context, None)


class _Recorded(_Block):
    """A span of the SDK's."""

    __slots__ = ("_span",)
    recording = True

    def __init__(self, span: trace.Span) -> None:
        super().__init__(_context_of(span), span)
        self._span = span

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        error = raised[1]
        if isinstance(error, BaseException):
            self.fail(error.code if isinstance(error, InferqError) else type(error).__name__)
        self._span.end()

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, name: str, value: Value | None) -> None:
        if value is not None:
            self._span.set_attribute(name, value)

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        self._span.add_event(name, attributes)

    def fail(self, code: str) -> None:
        self._span.set_attribute("error.type", code)
        self._span.set_status(trace.StatusCode.ERROR, code)


def _remote(context: TraceContext) -> contexts.Context:
    return _PROPAGATOR.extract(context.headers(), contexts.Context())


def _context_of(span: trace.Span) -> TraceContext:
    context = span.get_span_context()
    traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return TraceContext(traceparent, context.trace_state.to_header() if context.trace_state else "")


class _Exports(SpanProcessor):
    """The SDK's batch processor with its exporter, and the count of the spans that got lost between them.

    The SDK's queue drops its oldest span for each one that comes while it is full. It says so in a log alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limit = _max_queue_size()
        self._waiting = 0
        self._in_export = 0
        self.dropped = 0
        self._batches = BatchSpanProcessor(_CountedExporter(self), max_queue_size=self._limit)

    @property
    def unexported(self) -> int:
        """Spans that are neither exported nor known to be dropped."""
        return self._waiting + self._in_export

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._lock:
            if self._waiting >= self._limit:
                self.dropped += 1
            else:
                self._waiting += 1
        self._batches.on_end(span)

    def begin_export(self, count: int) -> None:
        with self._lock:
            self._waiting = max(0, self._waiting - count)
            self._in_export = count

    def end_export(self, *, exported: bool) -> None:
        with self._lock:
            self.dropped += 0 if exported else self._in_export
            self._in_export = 0

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._batches.force_flush(timeout_millis)


class _CountedExporter(SpanExporter):
    """The OTLP exporter. A batch that it cannot export is dropped and counted."""

    def __init__(self, counts: _Exports) -> None:
        self._counts = counts
        self._otlp = OTLPSpanExporter()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._counts.begin_export(len(spans))
        result = SpanExportResult.FAILURE
        reason = "refused"
        try:
            result = self._otlp.export(spans)
        except Exception as error:  # requests raises errors of its own, and so may what encodes
            reason = type(error).__name__
        exported = result is SpanExportResult.SUCCESS
        self._counts.end_export(exported=exported)
        if not exported:
            _log.warning("%d spans dropped: the collector did not take them (%s)", len(spans), reason)
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]


def _max_queue_size() -> int:
    try:
        return int(os.environ.get(_MAX_QUEUE, _DEFAULT_MAX_QUEUE))
    except ValueError as error:
        raise ValueError(f"{_MAX_QUEUE} is no whole number") from error
