from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery

from inferq.broker import ASSEMBLE_JOB, CALLBACK_JOB, FEED_JOB, Message
from inferq.consumers.batches.jobs import add_jobs
from inferq.consumers.batches.services import BatchServices
from inferq.producer.batch import start
from inferq.schemas import tracing
from inferq.schemas.trace_context import TraceContext
from tests.batch.conftest import BatchSite, QuickWorker
from tests.traces.collector import Collector

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GIVEN = TraceContext(f"00-{TRACE}-00f067aa0ba902b7-01")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """The jobs that are published; nothing runs them."""
    jobs: list[Message] = []
    monkeypatch.setattr(BatchServices, "confirm", lambda _, message: jobs.append(message))
    return jobs


def run_jobs(site: BatchSite, published: list[Message]) -> dict[str, Any]:
    """Run all published jobs of the batch, and give the arguments of its callback."""
    app = Celery(set_as_current=False)
    add_jobs(app, site.services)
    while (job := published.pop(0)).type in (FEED_JOB, ASSEMBLE_JOB):
        app.tasks[job.type].apply(kwargs=_arguments(job)).get()
    assert job.type == CALLBACK_JOB
    return _arguments(job)


def _arguments(job: Message) -> dict[str, Any]:
    arguments: dict[str, Any] = json.loads(job.body)[1]
    return arguments


def submit(site: BatchSite, lines: int = 3) -> str:
    content = b"".join(b'{"payload": %d}\n' % number for number in range(lines))
    batch = site.batch(content, callback_url="https://example.com/hook")
    start(batch, site.services.batches, site.services.confirm, GIVEN)
    return batch.batch_id


def test_a_batch_is_one_trace_and_each_line_links_to_it(
    site: BatchSite,
    published: list[Message],
    worker: QuickWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Collector() as collector:
        for name, value in collector.settings().items():
            monkeypatch.setenv(name, value)
        with tracing.exporting("callbacks"):
            batch_id = submit(site)
            callback = run_jobs(site, published)
    spans = collector.trace(TRACE)
    *slices, assembly, sent = spans
    assert {span.attributes["inferq.job"] for span in slices} == {"batches.feed"}
    assert assembly.attributes["inferq.job"] == "batches.assemble"
    assert {span.parent_id for span in (*slices, assembly)} == {"00f067aa0ba902b7"}
    assert (sent.name, sent.parent_id) == ("send inference.callbacks", assembly.span_id)
    # The lines add no span to the batch's trace, and are in none themselves before a worker begins theirs.
    assert len(worker.headers) == 3
    assert {line["x-trace-link"] for line in worker.headers} <= {
        f"00-{TRACE}-{span.span_id}-01" for span in slices
    }
    assert not any("traceparent" in line for line in worker.headers)
    assert callback["trace"] == {"traceparent": f"00-{TRACE}-{sent.span_id}-01"}
    summary = site.services.batches.summary("default", batch_id)
    assert summary is not None
    assert summary.trace_id == json.loads(callback["callback"]["body"])["data"]["trace_id"] == TRACE


def test_off_the_batchs_trace_is_carried_to_its_callback(
    site: BatchSite, published: list[Message], worker: QuickWorker
) -> None:
    submit(site)
    callback = run_jobs(site, published)
    assert callback["trace"] == GIVEN.headers()
    assert json.loads(callback["callback"]["body"])["data"]["trace_id"] == TRACE
    assert len(worker.headers) == 3
    assert not any("traceparent" in line or "x-trace-link" in line for line in worker.headers)
