from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry import trace

from inferq.broker import Delivery, Message, task_message
from inferq.broker.messages import retry_message
from inferq.broker.spans import processing, sending, traced
from inferq.producer.client.requests import Request
from inferq.schemas import InstallationError, InvalidTask, parse_task, tracing
from inferq.schemas.trace_context import TraceContext, trace_context
from tests.traces.collector import Collector
from tests.waiting import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GIVEN = TraceContext(f"00-{TRACE}-00f067aa0ba902b7-01", "vendor=a")
TASK = parse_task({"task_id": "t", "task_type": "echo", "payload": 1})


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


def use(patch: pytest.MonkeyPatch, collector: Collector, **settings: str) -> None:
    for name, value in (collector.settings() | settings).items():
        patch.setenv(name, value)


def delivered(message: Message) -> Delivery:
    return Delivery("inference.echo.normal", 1, 1, message.body, message.routing_key, message.headers, False)


def test_off_nothing_is_imported_and_every_span_is_the_same_object() -> None:
    code = """
import sys
from inferq.schemas import tracing
from inferq.broker import Message, spans
with tracing.exporting("worker"), tracing.span("a") as span, tracing.span("b", "consumer") as other:
    assert span is other is tracing.current() is spans.sending(Message("e", "k", b"")) and span.context is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_program_that_need_not_export_goes_on_without_traces(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with tracing.exporting("cli", required=False):
        assert not tracing.on()
    assert "OTEL_EXPORTER_OTLP_PROTOCOL" in caplog.text
    with pytest.raises(InstallationError, match="OTEL_EXPORTER_OTLP_PROTOCOL"), tracing.exporting("worker"):
        pass


def test_spans_reach_the_collector_as_a_tree(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    use(monkeypatch, collector, OTEL_RESOURCE_ATTRIBUTES="deployment.environment=here")
    with (
        tracing.exporting("worker"),
        tracing.span("outer", "server", parent=GIVEN, attributes=lambda: {"a": 1}) as outer,
        tracing.span("inner") as inner,
    ):
        inner.event("progress", {"inferq.progress": 0.5})
        tracing.current().set("b", "two")
    assert not tracing.on()
    first, second = collector.trace(TRACE)
    assert (first.name, first.kind, first.parent_id) == ("outer", "server", "00f067aa0ba902b7")
    assert (first.service, first.attributes) == ("inferq-worker", {"a": 1})
    assert outer.context == TraceContext(f"00-{TRACE}-{first.span_id}-01", "vendor=a")
    assert (second.name, second.kind, second.parent_id) == ("inner", "internal", first.span_id)
    assert (second.attributes, second.events) == ({"b": "two"}, (("progress", {"inferq.progress": 0.5}),))


def test_an_error_is_told_by_its_code_alone(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    use(monkeypatch, collector)
    with tracing.exporting("worker"):
        with pytest.raises(InvalidTask), tracing.span("a"):
            raise InvalidTask("the text 'my secret'", code="too_short")
        with pytest.raises(ValueError, match="my secret"), tracing.span("b"):
            raise ValueError("my secret")
    one, two = collector.spans
    assert one.failed
    assert two.failed
    assert (one.attributes, two.attributes) == ({"error.type": "too_short"}, {"error.type": "ValueError"})
    assert not one.events
    assert not two.events


def test_a_retry_goes_on_in_the_trace_of_its_task(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    use(monkeypatch, collector)
    first = delivered(traced(task_message(TASK), GIVEN))
    with tracing.exporting("worker"):
        with processing(first):
            retry = retry_message(first, task_id="t", type_name="echo", priority="normal", seconds=5)
            with sending(retry) as span:
                second = delivered(traced(retry, span.context))
        with processing(second):
            assert second.attempt == 2
    attempt, sent, again = collector.trace(TRACE)
    assert [span.parent_id for span in (attempt, sent, again)] == [
        "00f067aa0ba902b7", attempt.span_id, sent.span_id,
    ]  # fmt: skip
    assert (attempt.name, attempt.kind) == ("process inference.echo.normal", "consumer")
    assert attempt.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "inference.tasks:task_type.echo.normal:inference.echo.normal",
        "messaging.rabbitmq.destination.routing_key": "task_type.echo.normal",
        "messaging.message.id": "t",
        "messaging.message.body.size": len(TASK.body()),
        "inferq.attempt": 1,
    }
    assert (sent.name, sent.kind) == ("send inference.retry.5s", "producer")
    assert sent.attributes["messaging.destination.name"] == "inference.retry.5s:task_type.echo.normal"
    assert again.attributes["inferq.attempt"] == 2


def test_a_line_of_a_batch_begins_a_trace_with_a_link(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    use(monkeypatch, collector)
    line = delivered(task_message(TASK, link=GIVEN))
    assert trace_context(line.headers) is None
    with tracing.exporting("worker"), processing(line) as span:
        assert span.context is not None
        assert span.context.trace_id != TRACE
    (seen,) = collector.spans
    assert (seen.parent_id, seen.links) == ("", (f"{TRACE}-00f067aa0ba902b7",))


@pytest.mark.parametrize("broken", ["", "00-0-0-01", 7])
def test_a_broken_traceparent_begins_a_new_trace(
    monkeypatch: pytest.MonkeyPatch, collector: Collector, broken: object
) -> None:
    use(monkeypatch, collector)
    message = task_message(TASK)._replace(headers={"traceparent": broken, "x-trace-link": broken})
    with tracing.exporting("worker"), processing(delivered(message)):
        pass
    (seen,) = collector.spans
    assert (seen.parent_id, seen.links) == ("", ())


def test_an_unsampled_trace_goes_on_and_is_not_exported(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    use(monkeypatch, collector, OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0")
    with tracing.exporting("worker"):
        with tracing.span("outer") as outer, tracing.span("inner") as inner:
            assert outer.context is not None
            assert inner.context == outer.context
            assert not int(outer.context.traceparent[-2:], 16) & 1, "the flag says that it is sampled"
            assert tracing.outgoing_headers() == outer.context.headers()
        with tracing.span("sampled by the producer", parent=GIVEN):
            pass
    assert [span.name for span in collector.spans] == ["sampled by the producer"]


def test_a_collector_that_hangs_holds_nothing_up_and_what_it_misses_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Collector(hangs=True) as collector:
        use(monkeypatch, collector, OTEL_BSP_MAX_QUEUE_SIZE="4", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="2")
        with tracing.exporting("worker"):
            for _ in range(2):
                with tracing.span("first"):
                    pass
            eventually(lambda: collector.requests)
            for _ in range(10):
                with tracing.span("later"):
                    pass
            assert tracing.spans_dropped() == 6
            assert collector.hangs
            monkeypatch.setattr("inferq.schemas.trace_export._FLUSH_SECONDS", 0.1)
        assert "last spans" in {thread.name for thread in threading.enumerate()}, "the part's end waited"


def test_a_collector_that_refuses_loses_spans_and_each_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector(status=400) as collector:
        use(monkeypatch, collector)
        with tracing.exporting("worker"):
            with tracing.span("a"):
                pass
            assert eventually(tracing.spans_dropped) == 1
    # Now nobody listens there.
    with tracing.exporting("worker"):
        with tracing.span("b"):
            pass
        assert eventually(tracing.spans_dropped) == 1


def test_spans_of_many_threads_are_kept_apart(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    use(monkeypatch, collector)
    gate = threading.Barrier(4)

    def work(number: int) -> None:
        with tracing.span(f"outer {number}"):
            gate.wait(30)
            with tracing.span(f"inner {number}"):
                gate.wait(30)

    with tracing.exporting("worker"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(4):
        (outer,), (inner,) = collector.named(f"outer {number}"), collector.named(f"inner {number}")
        assert inner.parent_id == outer.span_id


def test_a_client_goes_on_in_the_trace_of_the_program_that_uses_it() -> None:
    inner = trace.SpanContext(int(TRACE, 16), 0xB7, is_remote=False, trace_flags=trace.TraceFlags(1))
    assert "traceparent" not in Request("PUT", "/v1/tasks/t").arguments(1)["headers"]
    with trace.use_span(trace.NonRecordingSpan(inner)):
        headers = Request("PUT", "/v1/tasks/t", headers={"Prefer": "wait=1"}).arguments(1)["headers"]
    assert headers == {"Prefer": "wait=1", "traceparent": f"00-{TRACE}-00000000000000b7-01"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no HTTP URL"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is no HTTP"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "many"}, "OTEL_BSP_MAX_QUEUE_SIZE is no whole number"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "1"}, "a variable OTEL_* is wrong"),
    ],
)
def test_settings_that_cannot_work_are_refused_early(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InstallationError, match="OTEL") as raised, tracing.exporting("worker"):
        pass
    assert said in raised.value.message


def test_missing_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delitem(sys.modules, "inferq.schemas.trace_export", raising=False)
    monkeypatch.delattr("inferq.schemas.trace_export", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InstallationError) as raised:
        tracing.wanted()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in raised.value.message
    assert "pip install 'inferq[otel]'" in raised.value.message


@pytest.mark.parametrize(
    "settings",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_the_standard_variables_turn_it_off(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with tracing.exporting("worker"):
        assert not tracing.on()
