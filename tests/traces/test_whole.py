"""A task's trace, from an HTTP request through the queue, a retry and the engine to its callback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferq.consumers.jobs.worker import declare
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import free_ports
from tests.callbacks.conftest import TENANT, Caller, Receiver
from tests.conftest import RabbitMQ
from tests.forked import ForkedPart
from tests.traces.collector import Collector, Seen, tree
from tests.waiting import eventually
from tests.worker.conftest import Site, WorkerProcess, site_at

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=a"}


@pytest.fixture
def site(fresh_amqp_url: str, shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path: Path) -> Iterator[Site]:
    with site_at(fresh_amqp_url, shared_rabbitmq, redis_url, tmp_path) as place:
        declare(place.broker)
        yield place


@contextmanager
def gateway(site: Site, **settings: str) -> Iterator[httpx.Client]:
    """A client of `inferq gateway`, as the tenant of the callbacks."""
    keys, port = site.folder / "keys.json", free_ports(1)[0]
    key = KeyFile(keys).add(TENANT)
    env = site.env | {"INFERQ_API_KEYS_FILE": str(keys), **settings}
    process = ForkedPart("gateway", "--port", str(port), env=env, log=site.folder / "gateway.log")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:

        def ready() -> bool:
            assert process.poll() is None, (site.folder / "gateway.log").read_text()
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(ready, "a ready gateway")
        yield client
    process.terminate()
    assert process.wait(30) == 0


@contextmanager
def callbacks(site: Site, **settings: str) -> Iterator[Caller]:
    caller = Caller(site)
    caller.secrets.rotate(TENANT)
    caller.start(**settings)
    try:
        yield caller
    finally:
        caller.stop()


def submitted(client: httpx.Client, receiver: Receiver, *, headers: dict[str, str], **fields: Any) -> Any:
    """The answer to a task whose first attempt fails, and which reports to the receiver."""
    body = {
        "task_type": "faulty",
        "callback_url": receiver.url,
        "callback_events": ["started", "completed"],
        **fields,
    }
    answer = client.post("/v1/tasks", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def named(spans: list[Seen], name: str) -> list[Seen]:
    return [span for span in spans if span.name == name]


def one(spans: list[Seen], name: str) -> Seen:
    (found,) = named(spans, name)
    return found


def test_a_task_is_one_connected_trace_from_its_request_through_a_retry_to_its_callback(
    site: Site, tmp_path: Path
) -> None:
    with Collector() as collector, Receiver() as receiver:
        traced = collector.settings()
        with gateway(site, **traced) as client, callbacks(site, **traced) as caller:
            worker = site.worker(**traced)
            options = {"times": 1, "marker": str(tmp_path / "marker")}
            task = submitted(client, receiver, headers=TRACEPARENT, fault="stumble", options=options)
            result = site.ended(task["task_id"])
            eventually(lambda: len(receiver.got) == 3, "three callbacks")
            status = client.get(f"/v1/tasks/{task['task_id']}").json()
            worker.stop()
            eventually(lambda: len(named(collector.trace(TRACE), "POST")) == 3)
            secret = caller.secrets.of(TENANT)[0]
        spans = collector.trace(TRACE)
    for log in (site.folder / "gateway.log", worker.log, caller.log):
        assert f'"trace_id": "{TRACE}"' in log.read_text()
    print(f"\n{tree(spans)}")  # noqa: T201 - shown by pytest -s

    assert (result.status, result.attempts, result.trace_id) == ("succeeded", 2, TRACE)
    assert task["trace_id"] == status["trace_id"] == TRACE
    assert {json.loads(got.body)["data"]["trace_id"] for got in receiver.got} == {TRACE}
    assert [got.verify(secret)["type"] for got in receiver.got].count("task.succeeded") == 1

    known = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in known]
    assert [(root.name, root.parent_id) for root in roots] == [("POST /v1/tasks", PARENT)]
    assert {span.service for span in spans} == {"inferq-gateway", "inferq-worker", "inferq-callbacks"}

    (request,) = roots
    assert request.attributes["http.response.status_code"] == 202
    sent = one(spans, "send inference.tasks")
    first, second = named(spans, "process inference.faulty.normal")
    retry = one(spans, "send inference.retry.5s")
    assert [sent.parent_id, first.parent_id, retry.parent_id, second.parent_id] == [
        request.span_id, sent.span_id, first.span_id, retry.span_id,
    ]  # fmt: skip
    assert (first.failed, first.attributes["error.type"]) == (True, "not_now")
    assert [attempt.attributes["inferq.outcome"] for attempt in (first, second)] == ["retried", "succeeded"]
    for name in ("fetch", "inference"):
        assert [span.parent_id for span in named(spans, name)] == [first.span_id, second.span_id]
    for name in ("upload", "record"):
        assert one(spans, name).parent_id == second.span_id
    failed, computed = named(spans, "inference")
    assert failed.events == (("progress", {"inferq.progress": 0.5, "inferq.note": "half"}),)
    assert computed.attributes["inferq.engine.name"] == "faulty"

    handed = {span.span_id: span for span in named(spans, "send inference.callbacks")}
    attempts = {span.span_id: span for span in named(spans, "process inference.callbacks")}
    calls = named(spans, "POST")
    assert {span.parent_id for span in attempts.values()} == handed.keys()
    assert {call.parent_id for call in calls} == attempts.keys()
    assert {call.attributes["http.response.status_code"] for call in calls} == {200}
    # The receiver may go on in the trace.
    assert {got.headers["traceparent"] for got in receiver.got} == {
        f"00-{TRACE}-{call.span_id}-01" for call in calls
    }


def test_off_the_producers_trace_is_carried_through_and_named(site: Site, tmp_path: Path) -> None:
    with Receiver() as receiver, gateway(site) as client, callbacks(site):
        site.worker()
        options = {"times": 1, "marker": str(tmp_path / "marker")}
        task = submitted(client, receiver, headers=TRACEPARENT, fault="stumble", options=options)
        result = site.ended(task["task_id"])
        eventually(lambda: len(receiver.got) == 3, "three callbacks")
        status = client.get(f"/v1/tasks/{task['task_id']}").json()
        broken = submitted(client, receiver, headers={"traceparent": "00-0-0-00"})
        untraced = site.ended(broken["task_id"])
    assert result.trace_id == task["trace_id"] == status["trace_id"] == TRACE
    three = receiver.got[:3]
    assert {json.loads(got.body)["data"]["trace_id"] for got in three} == {TRACE}
    for name, value in TRACEPARENT.items():
        assert {got.headers[name] for got in three} == {value}
    assert broken["trace_id"] is untraced.trace_id is None


def test_a_collector_that_hangs_holds_up_no_task(site: Site) -> None:
    with Collector(hangs=True) as collector:
        few = {"OTEL_BSP_MAX_QUEUE_SIZE": "1", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}
        worker = site.worker(**collector.settings(), **few)
        results = [site.ended(site.publish({})) for _ in range(3)]
        assert [result.status for result in results] == ["succeeded"] * 3
        assert len({result.trace_id for result in results} - {None}) == 3
        assert eventually(lambda: _dropped(worker)) > 0
        assert collector.requests == 1
        assert worker.stop() == 0
        assert collector.hangs


def _dropped(worker: WorkerProcess) -> float:
    lines = worker.get("/metrics").text.splitlines()
    return next(
        float(line.split()[1]) for line in lines if line.startswith("inferq_trace_spans_dropped_total ")
    )
