"""Spans of messages, by OpenTelemetry's conventions for messaging and RabbitMQ.

https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/

A task's message carries the context of the span that sent it. The span that processes it is that span's child: a worker
takes one task at a time, so a task is one trace, through all its attempts and callbacks. The lines of a batch are an
exception: each begins a trace, with a link to the batch's. One trace could not hold them all.
"""

from __future__ import annotations

from collections.abc import Mapping

from inferq.broker.messages import TRACE_LINK, Delivery, Message, named_id
from inferq.broker.topology import JOBS, TASKS, JobQueue
from inferq.schemas import tracing
from inferq.schemas.trace_context import TRACEPARENT, TraceContext, trace_context
from inferq.schemas.tracing import NO_SPAN, Span, Value


def sending(message: Message) -> Span:
    """The span in which a task's message is published; see `traced`."""
    if not tracing.on():
        return NO_SPAN

    def attributes() -> Mapping[str, Value]:
        return _attributes("send", message.exchange, message.routing_key, message.message_id)

    return tracing.span(f"send {message.exchange}", "producer", attributes=attributes)


def sending_job(queue: JobQueue, job_id: str) -> Span:
    """The span in which a job's message is published. Its context is the job's `trace`."""
    if not tracing.on():
        return NO_SPAN
    return tracing.span(
        f"send {queue}", "producer", attributes=lambda: _attributes("send", JOBS, queue, job_id)
    )


def traced(message: Message, context: TraceContext | None) -> Message:
    """The message as part of this trace; unchanged if there is none."""
    if context is None:
        return message
    return message._replace(headers={**message.headers, **context.headers()})


def processing(delivery: Delivery) -> Span:
    """The span in which a task's delivery is processed."""
    if not tracing.on():
        return NO_SPAN
    headers = delivery.headers
    parent = trace_context(headers)
    link = trace_context({TRACEPARENT: headers.get(TRACE_LINK)}) if parent is None else None

    def attributes() -> Mapping[str, Value]:
        return {
            **_attributes("process", TASKS, delivery.routing_key, named_id(delivery), queue=delivery.queue),
            "messaging.message.body.size": len(delivery.body),
            "inferq.attempt": delivery.attempt,
        }

    return tracing.span(
        f"process {delivery.queue}", "consumer", parent=parent, link=link, attributes=attributes
    )


def processing_job(
    queue: JobQueue, name: str, trace: TraceContext | None, attributes: Mapping[str, Value]
) -> Span:
    """The span in which a job is processed. `trace`: see `job_trace`."""
    if not tracing.on():
        return NO_SPAN
    return tracing.span(
        f"process {queue}",
        "consumer",
        parent=trace,
        attributes=lambda: {
            **_attributes("process", JOBS, queue, None, queue=queue), "inferq.job": name, **attributes,
        },
    )  # fmt: skip


def job_trace(trace: object) -> TraceContext | None:
    """The context in a job's argument `trace`; None if it has none."""
    return trace_context(trace) if isinstance(trace, Mapping) else None


def _attributes(
    operation: str, exchange: str, routing_key: str, message_id: str | None, *, queue: str | None = None
) -> dict[str, Value]:
    attributes: dict[str, Value] = {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
        "messaging.destination.name": ":".join(filter(None, (exchange, routing_key, queue))),
        "messaging.rabbitmq.destination.routing_key": routing_key,
    }
    if message_id is not None:
        attributes["messaging.message.id"] = message_id
    return attributes
