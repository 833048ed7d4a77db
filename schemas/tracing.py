"""Spans of the part that runs, for OpenTelemetry. While tracing is off, nothing is imported and a span is nothing.

A part calls `exporting` once, in the process that does its work. The settings are OpenTelemetry's own variables:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

from inferq.schemas.errors import InstallationError
from inferq.schemas.trace_context import TraceContext

if TYPE_CHECKING:
    from inferq.schemas.trace_export import Recorder

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value = str | int | float | bool
Attributes = Callable[[], Mapping[str, Value]]
"""Gives the attributes of a span; called only if it may be recorded."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_log = logging.getLogger(__name__)

_recorder: Recorder | None = None


class Span:
    """A span that records nothing. Its context is the trace that is passed on, if any."""

    __slots__ = ("context",)
    recording: ClassVar[bool] = False

    def __init__(self, context: TraceContext | None = None) -> None:
        self.context = context

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_error: object) -> None:
        return

    def rename(self, _name: str) -> None:
        return

    def set(self, _name: str, _value: Value | None) -> None:
        """Set an attribute; None sets nothing."""

    def event(self, _name: str, _attributes: Mapping[str, Value]) -> None:
        return

    def fail(self, _code: str) -> None:
        """The span ends with an error of this code. Messages stay out of traces: they may quote what is private."""


NO_SPAN = Span()


def on() -> bool:
    """Whether spans are recorded."""
    return _recorder is not None


def span(
    name: str,
    kind: Kind = "internal",
    *,
    parent: TraceContext | None = None,
    link: TraceContext | None = None,
    attributes: Attributes | None = None,
) -> Span:
    """A span for a `with` block. An exception that leaves the block ends it with an error.

    Without a `parent` it is a child of the block's surrounding span. With a `link` it begins a trace of its own, which
    names the other span. Otherwise it begins a trace.
    """
    return NO_SPAN if _recorder is None else _recorder.span(name, kind, parent, link, attributes)


def current() -> Span:
    """The span of the surrounding block."""
    return NO_SPAN if _recorder is None else _recorder.current()


def outgoing_headers() -> dict[str, str]:
    """The headers of an HTTP request that continues the trace of the surrounding block.

    A program that uses inferq's client may have a trace of its own, recorded by its own OpenTelemetry.
    """
    headers: dict[str, str] = {}
    if _recorder is not None:
        context = _recorder.current().context
        headers = {} if context is None else context.headers()
    elif "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
    return headers


def spans_dropped() -> int:
    """How many ended spans were not exported: the collector is slow, refuses them, or is unavailable."""
    return 0 if _recorder is None else _recorder.dropped


def wanted() -> bool:
    """Whether the environment turns tracing on. Raises InstallationError for what cannot work."""
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name, "").strip()), None)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if endpoint is None or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    try:
        from inferq.schemas import trace_export
    except ImportError as error:
        raise InstallationError(
            f"{endpoint} is set, and the packages that export traces are not installed ({error.name}): "
            "pip install 'inferq[otel]', or unset the variable",
            code="otel_not_installed",
        ) from error
    trace_export.check_settings(endpoint)
    return True


@contextmanager
def exporting(part: str, *, required: bool = True) -> Iterator[None]:
    """Record and export the spans of this process while the block runs, if the environment turns tracing on.

    At the end it exports the last spans, and gives up on them after a few seconds. Raises InstallationError if it
    cannot export; unless `required`, it says so and goes on without traces: the variables may be another program's.
    """
    global _recorder
    try:
        enabled = wanted()
    except InstallationError as error:
        if required:
            raise
        _log.warning("no traces are exported: %s", error)
        enabled = False
    if not enabled:
        yield
        return
    from inferq.schemas.trace_export import Recorder

    _recorder = Recorder(part)
    try:
        yield
    finally:
        recorder, _recorder = _recorder, None
        recorder.close()
