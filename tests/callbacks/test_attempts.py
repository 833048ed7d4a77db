"""What follows each attempt: sent, put off, kept and forgotten, with nothing real around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Network, ip_network
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.contextvars import get_contextvars

from inferq.broker import BrokerSettings, Message, callback_message
from inferq.consumers.callbacks import jobs
from inferq.consumers.callbacks.delivery import Delivery, Job
from inferq.consumers.callbacks.metrics import CallbackMetrics
from inferq.consumers.callbacks.sending import Sender, Sent
from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.schemas import Callback, CallbackAttempt, CallbackRecord, InvalidTask
from inferq.schemas.trace_context import TraceContext, trace_context
from inferq.storage import StorageSettings, StoreOutage, WebhookSettings
from inferq.storage.fetch.addresses import AddressPolicy
from tests.callbacks.conftest import Receiver, callback, say
from tests.waiting import eventually

SECRETS = ("whsec_" + "A" * 32,)


@dataclass
class Around:
    """The secrets, the sender, the records and the queue of a delivery. An answer is a status or an error."""

    answers: list[int | Exception] = field(default_factory=list)
    sent: list[Callback] = field(default_factory=list)
    traces: list[TraceContext | None] = field(default_factory=list)
    noted: list[CallbackRecord] = field(default_factory=list)
    kept: dict[str, CallbackRecord] = field(default_factory=dict)
    queue: list[Message] = field(default_factory=list)
    store_fault: Exception | None = None
    schedule: tuple[float, ...] = (0, 1, 1)
    index: CallbackRecord | None = None

    def __post_init__(self) -> None:
        around: Any = self
        self.delivery = Delivery(
            settings=CallbackSettings(callback_schedule=self.schedule),
            secrets=around,
            sender=around,
            records=around,
            metrics=CallbackMetrics(CollectorRegistry()),
            publish=self.queue.append,
        )

    def of(self, _tenant: str) -> Sequence[str]:
        return SECRETS

    def send(self, callback: Callback, _secrets: Sequence[str], *, trace: TraceContext | None = None) -> Sent:
        self.sent.append(callback)
        self.traces.append(trace)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Sent(CallbackAttempt(at=datetime.now(UTC), seconds=0.1, status=answer))

    def note(self, record: CallbackRecord) -> None:
        self.noted.append(record)

    def known(self, _callback: Callback) -> CallbackRecord | None:
        return self.index

    def keep(self, record: CallbackRecord) -> None:
        if self.store_fault is not None:
            raise self.store_fault
        self.kept[record.callback_id] = record

    def drop(self, record: CallbackRecord) -> None:
        self.kept.pop(record.callback_id, None)

    def next_job(self) -> Job:
        return Job.model_validate(json.loads(self.queue.pop().body)[1])

    def run(self, job: Job) -> None:
        """Attempt after attempt, until the queue is empty."""
        self.delivery.attempt(job)
        while self.queue:
            self.delivery.attempt(self.next_job())


def failed(*statuses: int) -> tuple[CallbackAttempt, ...]:
    return tuple(CallbackAttempt(at=datetime.now(UTC), seconds=0.1, status=status) for status in statuses)


def new_job(*statuses: int, **more: Any) -> Job:
    return Job(callback=callback("https://example.com/"), attempts=failed(*statuses), **more)


def test_what_nobody_foresaw_is_an_attempt_that_the_record_shows() -> None:
    around = Around([RuntimeError("a secret")] * 3)
    around.run(new_job())
    (record,) = around.kept.values()
    assert [attempt.error for attempt in record.attempts] == ["internal: RuntimeError"] * 3
    assert "a secret" not in str(around.noted)


def test_every_attempt_is_made_in_the_trace_of_the_callback() -> None:
    given = trace_context({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=a"})
    assert given is not None
    around = Around([500, 500, 200])
    around.run(new_job(trace=given.headers()))
    assert around.traces == [given] * 3
    around = Around([200])
    around.run(new_job(trace={"traceparent": "broken"}))
    assert around.traces == [None]


def test_a_fault_after_an_attempt_is_bounded_by_the_schedule_too() -> None:
    around = Around()
    job = new_job()
    for _ in range(5):
        around.delivery.put_off(job, KeyError("x"))
        job = around.next_job()
    assert [attempt.error for attempt in job.attempts] == ["internal: KeyError"] * 3
    assert (around.noted[-1].state, around.noted[-1].reason) == ("waiting", "internal: KeyError")


def test_what_is_given_up_is_not_sent_again_while_it_cannot_be_kept() -> None:
    for answers in ([410], [500, 500, 500]):
        around = Around(list(answers), store_fault=StoreOutage("away"))
        job = new_job()
        for _ in range(len(answers) + 3):
            around.delivery.attempt(job)
            job = around.next_job()
        assert len(around.sent) == len(answers)
        around.store_fault = None
        around.run(job)
        (record,) = around.kept.values()
        assert [attempt.status for attempt in record.attempts] == answers


def test_a_last_attempt_that_is_made_twice_leaves_no_failure_behind() -> None:
    around = Around([500, 200])
    job = new_job(500, 500)
    around.delivery.attempt(job)
    assert around.kept
    around.delivery.attempt(job)  # it was not acknowledged
    assert not around.kept
    assert [record.state for record in around.noted] == ["failed", "delivered"]


def test_what_was_delivered_meanwhile_is_neither_sent_nor_kept_as_a_failure() -> None:
    """It was sent again, or a crash had made two of one job."""
    asked = datetime.now(UTC)
    delivered = Around([500, 200])
    delivered.run(new_job(500, resent_at=asked))
    (_, record) = delivered.noted
    assert (record.state, record.resent_at) == ("delivered", asked)

    around = Around([500, 500], index=record)
    around.run(new_job(500))
    around.run(new_job(500, resent_at=asked))
    assert not around.sent
    around.delivery.expire(new_job(500))
    assert not around.kept
    around.run(new_job(500, resent_at=asked + timedelta(seconds=1)))  # since then asked for once more
    assert len(around.sent) == 2
    assert around.kept


def test_a_process_shows_every_outcome_before_its_first_callback() -> None:
    registry = CollectorRegistry()
    jobs.CallbackJobs(
        CallbackSettings(), BrokerSettings(), StorageSettings(), WebhookSettings(), registry=registry
    )
    shown = {
        outcome: registry.get_sample_value("inferq_callbacks_total", {"outcome": outcome})
        for outcome in ("delivered", "again", "failed")
    }
    assert shown == {"delivered": 0, "again": 0, "failed": 0}  # a rise from an absent series counts nothing


@dataclass
class Arrivals:
    """Celery's way from the broker to the pool, with the pool and the broker replaced by lists."""

    around: Around
    pool: list[Message] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)
    broker_fault: Exception | None = None
    now: float = 0.0

    def __post_init__(self) -> None:
        around: Any = self
        self.jobs = jobs.CallbackJobs(
            self.around.delivery.settings,
            BrokerSettings(),
            StorageSettings(),
            WebhookSettings(),
            clock=lambda: self.now,
            registry=CollectorRegistry(),
        )
        vars(self.jobs).update(
            _delivery=self.around.delivery, _publisher=around, _metrics=self.around.delivery.metrics
        )
        app: Any = SimpleNamespace(amqp=SimpleNamespace(queues=SimpleNamespace(consume_from=())))
        consumer = SimpleNamespace(pool=SimpleNamespace(limit=8), connection_errors=())
        self.handle = self.jobs.strategy(around, app, consumer)

    def publish(self, message: Message) -> Future[None]:
        if self.broker_fault is not None:
            raise self.broker_fault
        self.around.queue.append(message)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def arrive(self, job: Job) -> None:
        def ack(*_about: Any) -> None:
            self.settled.append("ack")

        def reject(_log: Any, _errors: Any, requeue: bool = False) -> None:
            self.settled.append("requeue" if requeue else "reject")

        message = callback_message(job.callback, attempts=job.attempts, since=job.since)
        self.handle(message, None, ack, reject, None)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Callable[[Around], Arrivals]:
    made: list[Arrivals] = []
    monkeypatch.setattr(
        jobs, "celery_strategy", lambda *_about: lambda message, *_more: made[-1].pool.append(message)
    )

    def make(around: Around) -> Arrivals:
        made.append(Arrivals(around))
        return made[-1]

    return make


def hang(arrivals: Arrivals) -> None:
    """Let the target of all have timed out, and be busy with one more."""
    targets, target = arrivals.jobs._targets, ("https", "example.com", 443)
    targets.enter(target)
    targets.leave(target, 15.0, timed_out=True)
    targets.enter(target)


def test_a_backlog_for_a_target_that_hangs_ends_by_the_schedule(
    arrivals: Callable[[Around], Arrivals],
) -> None:
    around = Around()
    line = arrivals(around)
    hang(line)
    line.arrive(new_job())
    aside = around.next_job()
    assert aside.since is not None
    day = timedelta(days=1)
    line.arrive(aside.model_copy(update={"since": aside.since - day}))
    again = around.next_job()
    assert again.since == aside.since - day
    late = again.model_copy(update={"since": again.since - timedelta(seconds=5)})
    line.arrive(late)
    # After a standstill of our own, it may well take what has piled up.
    late = around.next_job()
    line.now += 6 * 3600 + 1
    line.arrive(late)
    eventually(lambda: len(line.settled) == 4)
    assert line.settled == ["ack"] * 4
    assert not around.queue
    assert not around.sent
    assert "keeps timing out" in str(around.kept[late.callback.callback_id].reason)
    around.answers = [200]
    around.delivery.attempt(late)  # it was not acknowledged, and the target is back
    assert not around.kept


def test_what_is_late_is_sent_where_the_target_answers(arrivals: Callable[[Around], Arrivals]) -> None:
    line = arrivals(Around())
    line.arrive(new_job(since=datetime.now(UTC) - timedelta(days=9)))
    assert len(line.pool) == 1
    assert not line.around.kept


def test_every_attempt_carries_when_the_callback_was_first_seen() -> None:
    around = Around([500, 500])
    around.delivery.attempt(new_job())
    first = around.next_job()
    around.delivery.attempt(first)
    assert first.since == around.next_job().since is not None


def test_a_target_is_judged_by_its_own_time_only(arrivals: Callable[[Around], Arrivals]) -> None:
    around = Around([200])
    line = arrivals(around)
    told: list[float | None] = []
    targets: Any = SimpleNamespace(leave=lambda _target, seconds, *, timed_out: told.append(seconds))
    vars(line.jobs).update(_targets=targets)
    line.jobs.deliver(new_job())
    assert get_contextvars() == {}  # the thread's next job may be of another tenant
    line.jobs.deliver(new_job(410))  # given up before
    vars(around).update(of=lambda _tenant: ())
    line.jobs.deliver(new_job())
    assert told == [0.1, None, None]


def test_what_cannot_be_put_aside_is_taken_again_or_kept_apart(
    arrivals: Callable[[Around], Arrivals],
) -> None:
    line = arrivals(Around())
    hang(line)
    for fault in (StoreOutage("away"), InvalidTask("too large", code="unsendable")):
        line.broker_fault = fault
        line.arrive(new_job())
    assert line.settled == ["requeue", "reject"]


def test_only_tenants_that_may_reach_loopback(receiver: Receiver) -> None:
    receiver.answer = say(404, b"secrets of a local service")
    with closing(Sender(CallbackSettings(callback_loopback_tenants=("owner",)))) as sender:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{receiver.port}/admin"
            attempt = sender.send(callback(url, tenant="owner"), SECRETS).attempt
            assert (attempt.status, attempt.error, attempt.response) == (404, None, None)
            # The connection that is kept for the owner is not for others.
            attempt = sender.send(callback(url, tenant="guest"), SECRETS).attempt
            assert (attempt.status, attempt.response) == (None, None)
            assert "address_refused" in str(attempt.error)
    assert len(receiver.got) == 2


@pytest.mark.parametrize(("public", "kept"), [((), None), ((ip_network("127.0.0.0/8"),), "oh  no")])
def test_only_the_answer_of_a_public_address_is_kept(
    receiver: Receiver, public: tuple[IPv4Network, ...], kept: str | None
) -> None:
    receiver.answer = say(500, b"oh\x00 no")
    settings = CallbackSettings(callback_allowed_networks=(ip_network("127.0.0.0/8"),))
    with closing(Sender(settings, public=AddressPolicy(public))) as sender:
        attempt = sender.send(callback(receiver.url), SECRETS).attempt
    assert (attempt.status, attempt.response) == (500, kept)


def test_the_banner_of_a_server_without_http_is_not_kept(receiver: Receiver) -> None:
    def banner(handler: BaseHTTPRequestHandler, _number: int) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n")

    receiver.answer = banner
    settings = CallbackSettings(callback_allowed_networks=(ip_network("127.0.0.0/8"),))
    with closing(Sender(settings)) as sender:
        attempt = sender.send(callback(receiver.url), SECRETS).attempt
    assert (attempt.status, attempt.error) == (None, "the server's answer is not HTTP, or incomplete")


def test_an_attempt_has_its_whole_time_and_as_many_connections_as_threads() -> None:
    sender = Sender(CallbackSettings(callback_timeout=120))
    assert sender._pool._timeouts["read"] == sender._pool._timeouts["write"] == 120
    assert sender._pool._timeouts["connect"] == 40
    assert sender._pool._connections._max_connections > 1000
