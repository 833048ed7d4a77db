"""The headers of task messages, and which of them go on with a copy."""

from __future__ import annotations

from typing import Any

import pika
import pytest

from inferq.broker import (
    Delivery,
    Message,
    dead_message,
    deferred_message,
    retry_message,
    task_message,
    waiting_message,
)
from inferq.broker.messages import redriven_message
from inferq.broker.spans import traced
from inferq.schemas import SCHEMA_VERSION, InvalidTask, parse_task
from inferq.schemas.trace_context import TraceContext

TASK = parse_task({"task_id": "t", "task_type": "echo"})
ABOUT: dict[str, Any] = {"type_name": "echo", "priority": "normal"}
DIGEST, OTHER = "a" * 64, "b" * 64


def delivered(message: Message | None = None, **headers: object) -> Delivery:
    """The message as a worker gets it; without one, that of a producer of its own, with these headers."""
    message = message or Message("e", "task_type.echo.normal", TASK.body(), headers)
    return Delivery("inference.echo.normal", 1, 1, message.body, message.routing_key, message.headers, False)


def copies(delivery: Delivery, digest: str | None) -> dict[str, Message]:
    error = InvalidTask("no")
    return {
        "retry": retry_message(delivery, task_id="t", seconds=5, digest=digest, **ABOUT),
        "dead": dead_message(delivery, error=error, worker="w", digest=digest, **ABOUT),
        "redriven": redriven_message(delivery),
        "deferred": deferred_message(delivery, seconds=5, **ABOUT),
        "waiting": waiting_message(delivery, seconds=5, digest=digest, **ABOUT),
    }


def test_an_accepted_task_says_its_digest_and_the_version() -> None:
    delivery = delivered(task_message(TASK, digest=DIGEST))
    assert (delivery.digest, delivery.version) == (DIGEST, SCHEMA_VERSION)


@pytest.mark.parametrize("copy", ["retry", "dead", "redriven", "deferred", "waiting"])
def test_every_copy_keeps_the_digest_and_the_version_that_the_task_came_with(copy: str) -> None:
    message = task_message(TASK, digest=DIGEST)
    newer = message._replace(headers={**message.headers, "x-version": SCHEMA_VERSION + 1})
    again = delivered(copies(delivered(newer), OTHER)[copy])
    assert (again.digest, again.version) == (DIGEST, SCHEMA_VERSION + 1)


@pytest.mark.parametrize("copy", ["retry", "dead", "waiting"])
def test_the_digest_that_a_worker_had_to_make_goes_on(copy: str) -> None:
    assert delivered(copies(delivered(), DIGEST)[copy]).digest == DIGEST


@pytest.mark.parametrize("bad", ["", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", 5, None, [DIGEST]])
def test_a_header_that_is_no_digest_counts_as_absent(bad: object) -> None:
    delivery = delivered(**{"x-digest": bad})
    assert delivery.digest is None
    made = copies(delivery, DIGEST)
    assert made["retry"].headers["x-digest"] == made["dead"].headers["x-digest"] == DIGEST
    assert "x-digest" not in made["redriven"].headers


@pytest.mark.parametrize(("given", "version"), [({}, 1), ({"x-version": 3}, 3), ({"x-version": "x"}, 1)])
def test_a_message_without_a_version_is_of_the_first(given: dict[str, Any], version: int) -> None:
    assert delivered(**given).version == version


def test_a_deferral_is_no_attempt_and_is_counted_until_the_task_is_read() -> None:
    delivery = delivered(**{"x-attempt": 2, "x-digest": DIGEST})
    for number in range(3):
        assert (delivery.attempt, delivery.deferrals) == (2, number)
        delivery = delivered(deferred_message(delivery, seconds=5, **ABOUT))
    assert delivered(copies(delivery, None)["retry"]).deferrals == 0
    assert delivered(copies(delivery, None)["redriven"]).deferrals == 0


def test_a_copy_that_waits_keeps_all_counts() -> None:
    counts = {"x-attempt": 3, "x-redrives": 1, "x-engine-deaths": 2, "x-deferrals": 4, "x-version": 1}
    waiting = waiting_message(delivered(**counts), seconds=5, **ABOUT)
    assert waiting.headers == counts
    assert (waiting.exchange, waiting.body) == ("inference.retry.5s", TASK.body())


def test_waits_are_counted_in_a_row() -> None:
    waiting = delivered(waiting_message(delivered(), seconds=5, waits=2, **ABOUT))
    assert waiting.waits == 2
    assert {delivered(copy).waits for copy in copies(waiting, None).values()} == {0}


def test_every_copy_keeps_the_trace_and_nothing_that_is_none() -> None:
    whole = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=a"}
    link = {"x-trace-link": f"00-{'c' * 32}-{'d' * 16}-01"}
    for given, expected in (
        (whole | link, whole | link),
        (link, link),
        ({"traceparent": f"ff-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=a", "x-trace-link": 7}, {}),
    ):
        for copy in copies(delivered(**given), None).values():
            assert {name: copy.headers[name] for name in (*whole, *link) if name in copy.headers} == expected


@pytest.mark.parametrize("digest", [DIGEST, "0" * 64, None])
def test_each_message_travels_with_its_own_trace(digest: str | None) -> None:
    none = f"00-{'0' * 32}-{'0' * 16}-00"
    for number in range(3):
        trace = TraceContext(f"00-{number:032x}-{'b' * 16}-01", tracestate=none)
        message = traced(task_message(TASK, digest=digest, link=trace), trace)
        found = pika.BasicProperties().decode(message.encoded_properties())
        assert found.headers == dict(message.headers)
        assert found.headers["traceparent"] == trace.traceparent


def test_each_message_travels_with_its_own_digest() -> None:
    for digest in (DIGEST, OTHER, "0" * 64, TASK.digest()):
        message = task_message(TASK, digest=digest)
        found = pika.BasicProperties().decode(message.encoded_properties())
        expected = pika.BasicProperties().decode(b"".join(message.properties().encode()))
        assert found.headers == expected.headers == dict(message.headers)
        assert found.headers["x-digest"] == digest
        assert (found.message_id, found.type) == ("t", "echo")
