"""A collector of traces over OTLP and HTTP, which parses what it gets with the published protobufs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

KINDS = {
    Span.SPAN_KIND_INTERNAL: "internal",
    Span.SPAN_KIND_SERVER: "server",
    Span.SPAN_KIND_CLIENT: "client",
    Span.SPAN_KIND_PRODUCER: "producer",
    Span.SPAN_KIND_CONSUMER: "consumer",
}


@dataclass(frozen=True)
class Seen:
    """A span that the collector got. Ids are hexadecimal; `parent_id` is empty for the first span of a trace."""

    name: str
    kind: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    began: int
    ended: int
    failed: bool
    attributes: dict[str, Any] = field(default_factory=dict)
    events: tuple[tuple[str, dict[str, Any]], ...] = ()
    links: tuple[str, ...] = ()
    """The `trace id-span id` of each link."""


class Collector:
    """Answers `status` to each export. While it `hangs`, it takes the request and gives no answer."""

    def __init__(self, status: int = 200, *, hangs: bool = False) -> None:
        self.status = status
        self.spans: list[Seen] = []
        self.requests = 0
        self._goes_on = threading.Event()
        if not hangs:
            self._goes_on.set()

    def __enter__(self) -> Collector:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                assert self.headers["content-type"] == "application/x-protobuf"
                collector.requests += 1
                collector._goes_on.wait()
                if collector.status == 200:
                    collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
                with suppress(OSError):
                    self.send_response(collector.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_about: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._goes_on.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def hangs(self) -> bool:
        return not self._goes_on.is_set()

    def settings(self) -> dict[str, str]:
        """The environment of a part that exports here, soon after a span has ended."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def trace(self, trace_id: str) -> list[Seen]:
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began)

    def named(self, name: str) -> list[Seen]:
        return [span for span in self.spans if span.name == name]


def tree(spans: Sequence[Seen]) -> str:
    """The spans of one trace as a tree, with the milliseconds from its beginning and those each took."""
    known = {span.span_id for span in spans}
    start = min(span.began for span in spans)

    def lines(parent: str | None, depth: int) -> Iterator[str]:
        for span in spans:
            if (span.parent_id if span.parent_id in known else None) != parent:
                continue
            about = [f"{name}={span.attributes[name]}" for name in _SHOWN if name in span.attributes]
            about += [f"[{name} {list(said.values())}]" for name, said in span.events]
            name = "  " * depth + span.name
            yield (
                f"{(span.began - start) / 1e6:9.1f} {(span.ended - span.began) / 1e6:8.1f}  {name:<44} "
                f"{span.service.removeprefix('inferq-'):<10} {' '.join(about)}".rstrip()
            )
            yield from lines(span.span_id, depth + 1)

    return "\n".join([" at (ms) took (ms)", *lines(None, 0)])


_SHOWN = ("inferq.attempt", "inferq.outcome", "inferq.event", "error.type", "http.response.status_code")


def _spans(request: ExportTraceServiceRequest) -> Iterator[Seen]:
    for of_resource in request.resource_spans:
        service = _attributes(of_resource.resource.attributes)["service.name"]
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield Seen(
                    name=span.name,
                    kind=KINDS[span.kind],
                    service=service,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    began=span.start_time_unix_nano,
                    ended=span.end_time_unix_nano,
                    failed=span.status.code == Status.STATUS_CODE_ERROR,
                    attributes=_attributes(span.attributes),
                    events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
                    links=tuple(f"{link.trace_id.hex()}-{link.span_id.hex()}" for link in span.links),
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
