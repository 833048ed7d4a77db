"""Copies of one task: while a run of it is in progress, no other worker begins it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import redis

from inferq.broker import Delivery, Message
from inferq.consumers.runtime.messages import Done
from inferq.consumers.runtime.process import EngineDied
from inferq.consumers.worker.decision import LEASE_SECONDS, TAKE_OVER_SECONDS
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import Outage, Result, parse_task
from inferq.storage import StatusIndex, StorageSettings
from inferq.storage.status.keys import record_key
from tests.proxy import TcpProxy
from tests.runs import begin_run
from tests.waiting import eventually
from tests.worker.bench import services_at
from tests.worker.conftest import Site, WorkerProcess, starts


@dataclass
class Pair:
    """Two workers of one site, each with its own line to RabbitMQ."""

    workers: dict[str, WorkerProcess]
    lines: dict[str, TcpProxy]

    def settled(self, outcome: str) -> int:
        """How many deliveries ended so at either worker."""
        name = f'inferq_worker_tasks_total{{outcome="{outcome}",task_type="faulty"}} '
        count = 0
        for worker in self.workers.values():
            with suppress(httpx.TransportError):
                lines = worker.get("/metrics").text.splitlines()
                count += sum(int(float(s.removeprefix(name))) for s in lines if s.startswith(name))
        return count


@pytest.fixture(scope="module")
def pair(shared_site: Site) -> Iterator[Pair]:
    url = shared_site.env["INFERQ_AMQP_URL"]
    port = urlsplit(url).port
    assert port is not None
    lines = {name: TcpProxy(port) for name in ("first", "second")}
    workers = {
        name: shared_site.start_worker(
            INFERQ_WORKER_NAME=name, INFERQ_AMQP_URL=url.replace(f":{port}/", f":{line.port}/")
        )
        for name, line in lines.items()
    }
    for worker in workers.values():
        worker.wait_ready()
    yield Pair(workers, lines)
    for line in lines.values():
        line.close()


@dataclass
class Gate:
    """A task whose runs wait at the engine until it is opened."""

    site: Site
    folder: Path
    task_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def publish(self) -> None:
        options = {"gate": str(self.folder / "gate"), "marker": str(self.folder / "marker")}
        self.site.publish({"task_id": self.task_id, "fault": "gate", "options": options})

    @property
    def starts(self) -> int:
        return starts(self.folder / "marker")

    @property
    def worker(self) -> str:
        """The worker of the run on record."""
        status = eventually(lambda: self.site.state(self.task_id))
        assert status is not None
        return str(status.worker)

    def open(self) -> None:
        (self.folder / "gate").touch()


@pytest.fixture
def gate(site: Site, tmp_path: Path) -> Gate:
    return Gate(site, tmp_path)


@pytest.mark.shared
def test_of_two_copies_on_two_idle_workers_one_runs_and_the_other_waits(
    site: Site, gate: Gate, pair: Pair
) -> None:
    waited, skipped = pair.settled("duplicate"), pair.settled("skipped")
    gate.publish()
    gate.publish()
    eventually(lambda: pair.settled("duplicate") > waited + 1, "a copy that waits")
    gate.open()
    assert site.ended(gate.task_id).attempts == 1
    eventually(lambda: pair.settled("skipped") == skipped + 1, "the copy found the result")
    assert gate.starts == 1
    assert site.depth("inference.faulty.normal") == site.depth("inference.retry.5s") == 0


@pytest.mark.shared
def test_a_task_whose_worker_lost_its_connection_is_not_run_by_an_idle_one(
    site: Site, gate: Gate, pair: Pair
) -> None:
    waited, skipped = pair.settled("duplicate"), pair.settled("skipped")
    gate.publish()
    eventually(lambda: gate.starts)
    pair.lines[gate.worker].cut()
    eventually(lambda: pair.settled("duplicate") > waited, "the redelivered message waits")
    gate.open()
    assert site.ended(gate.task_id).status == "succeeded"
    eventually(lambda: pair.settled("skipped") == skipped + 1, "the message found the result")
    assert gate.starts == 1


@pytest.mark.shared
def test_a_killed_workers_task_starts_again_before_its_lease_ends(site: Site, gate: Gate, pair: Pair) -> None:
    waited = pair.settled("duplicate")
    gate.publish()
    gate.publish()
    eventually(lambda: pair.settled("duplicate") > waited, "a copy that waits")
    name = gate.worker
    killed, at = pair.workers.pop(name), time.monotonic()
    skipped = pair.settled("skipped")
    killed.process.kill()
    eventually(lambda: gate.starts == 2, "another start")
    assert time.monotonic() - at < LEASE_SECONDS
    site.workers.remove(killed)
    killed.discard()
    gate.open()
    result = site.ended(gate.task_id)
    assert (result.status, result.attempts) == ("succeeded", 1)
    assert result.worker != name
    eventually(lambda: pair.settled("skipped") == skipped + 1, "the copy found the result")
    assert gate.starts == 2


# In one process, with an engine made for the purpose.

TASK = {"task_id": "t", "task_type": "echo", "payload": 1}
DELIVERY = Delivery(
    queue="inference.echo.normal", tag=1, epoch=1, body=json.dumps(TASK).encode(),
    routing_key="task_type.echo.normal", headers={}, redelivered=False,
)  # fmt: skip


class Engine:
    """An engine that is always free, and its lease. `busy`: only from the second time on."""

    usable, info, shared = True, None, False
    computing = nullcontext

    def __init__(self, run: Any, busy: bool) -> None:
        self.engine = self
        self.held = False
        self._run = run
        self._busy = busy
        self.runs = 0

    def acquire(self, *_: object, **__: object) -> bool:
        self.held, self._busy = not self._busy, False
        return self.held

    def release(self) -> None:
        self.held = False

    step_aside = finish = release

    def prepare(self, _task: str) -> None:
        return

    def run(self, *_arguments: Any, **_more: Any) -> Done:
        self.runs += 1
        self._run()
        return Done(output=b'{"payload": 1}', artifacts={}, seconds=0.0)


class Bench:
    """A worker's services, and what its task runs publish."""

    def __init__(self, storage: StorageSettings, folder: Path) -> None:
        self.sent: list[Message] = []
        self.delivered = True
        self.services = services_at(storage, folder, self)

    def publish(self, message: Message) -> Future[None]:
        self.sent.append(message)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def complete(self, delivery: Delivery, run: Any = lambda: None, *, busy: bool = False) -> int:
        """Bring a delivery to its end, and give how often the engine ran. `delivered` says whether RabbitMQ still
        knows the message as this worker's."""
        consumer = SimpleNamespace(
            ack=lambda *_, **__: None,
            requeue=lambda _: None,
            holds=lambda _: self.delivered,
            look_early=lambda: None,
        )
        engine = Engine(run, busy)
        TaskRun(self.services, cast(Any, consumer), cast(Any, engine), delivery, "normal").complete()
        return engine.runs

    def count(self, name: str, **labels: str) -> float:
        labels = {"task_type": "echo", **labels}
        return self.services.metrics.registry.get_sample_value(f"inferq_worker_{name}_total", labels) or 0


@pytest.fixture
def bench(redis_url: str, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(StorageSettings(redis_url=redis_url), tmp_path)
    yield bench
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    bench.services.status.close()
    bench.services.scratch.close()


def lease(status: StatusIndex) -> str:
    return str(status.write(lambda client: client.hget(record_key("default", "t"), "h")))


def age_lease(status: StatusIndex, seconds: float) -> None:
    """Let the lease look as if its run gave no sign of life for so long."""
    key = record_key("default", "t")
    at, _, run = str(status.write(lambda client: client.hget(key, "h"))).partition(" ")
    status.write(lambda client: client.hset(key, "h", f"{int(at) - round(seconds * 1000)} {run}"))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "taken ahead"])
def test_a_copy_waits_as_the_same_attempt(bench: Bench, busy: bool) -> None:
    copy = replace(DELIVERY, headers={"x-attempt": 3})

    def second_copy() -> None:
        assert bench.complete(copy, busy=busy) == 0

    assert bench.complete(DELIVERY, second_copy) == 1
    (waiting,) = bench.sent
    assert (waiting.exchange, waiting.routing_key) == ("inference.retry.5s", DELIVERY.routing_key)
    assert (waiting.body, waiting.headers["x-attempt"]) == (DELIVERY.body, 3)
    assert bench.count("tasks", outcome="duplicate") == 1
    # Its task has ended when it comes again.
    assert bench.complete(copy) == 0
    assert bench.count("tasks", outcome="skipped") == 1
    assert len(bench.sent) == 1


def test_a_copy_decides_nothing_about_a_task_that_runs(bench: Bench) -> None:
    """Neither its expiry nor a cancel, which the run in progress heeds by itself."""
    late = {**TASK, "expires_at": "2020-01-01T00:00:00Z"}
    begin_run(bench.services.status, parse_task(late), run="another")
    bench.services.status.request_cancel("default", "t")
    assert bench.complete(replace(DELIVERY, body=json.dumps(late).encode())) == 0
    assert bench.count("tasks", outcome="duplicate") == 1
    assert bench.services.results.load("default", "t") is None


@pytest.mark.parametrize(("redelivered", "silence"), [(False, LEASE_SECONDS), (True, TAKE_OVER_SECONDS)])
def test_a_silent_run_is_taken_over_and_its_result_is_discarded_and_counted(
    bench: Bench, redelivered: bool, silence: float
) -> None:
    """Its worker was suspended, or its line to Redis was cut."""

    def lose_the_lease() -> None:
        age_lease(bench.services.status, silence)
        assert bench.complete(replace(DELIVERY, redelivered=redelivered)) == 1

    assert bench.complete(DELIVERY, lose_the_lease) == 1
    kept = bench.services.results.load("default", "t")
    assert kept is not None
    assert (kept.status, kept.attempts) == ("succeeded", 1)
    assert bench.count("repeated_runs") == 1
    assert bench.count("tasks", outcome="succeeded") == bench.count("tasks", outcome="skipped") == 1
    status = bench.services.status.get("default", "t")
    assert status is not None
    assert status.state == "succeeded"


def test_a_redelivered_message_waits_for_a_dead_run_no_longer_than_it_must(bench: Bench) -> None:
    begin_run(bench.services.status, parse_task(TASK), run="of a killed worker")
    began = time.monotonic()
    assert bench.complete(replace(DELIVERY, redelivered=True)) == 1
    assert time.monotonic() - began < LEASE_SECONDS
    assert bench.sent == []
    assert bench.count("repeated_runs") == 0


def test_a_redelivered_message_finds_the_end_of_the_run_that_it_watched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, services, load = parse_task(TASK), bench.services, bench.services.results.load
    begin_run(services.status, task, run="another")
    result = Result(
        task_id="t", task_type="echo", tenant="default", status="succeeded", attempts=1, digest=task.digest(),
        finished_at=datetime.now(UTC),
    )  # fmt: skip
    looks = []

    def end_after_the_first_look(tenant: str, task_id: str) -> Result | None:
        looks.append(load(tenant, task_id))
        if len(looks) == 1:
            services.results.save(result)
            services.status.ended(result)
        return looks[-1]

    monkeypatch.setattr(services.results, "load", end_after_the_first_look)
    assert bench.complete(replace(DELIVERY, redelivered=True)) == 0
    assert looks == [None, result]
    assert bench.count("tasks", outcome="skipped") == 1


@pytest.mark.parametrize("wait", ["scratch.check", "results.load"])
def test_a_run_that_waits_before_its_engine_ends_its_lease_once_its_message_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    """Otherwise a worker with a full disk would keep the task from the workers that can run it."""
    part, _, method = wait.partition(".")
    works = getattr(getattr(bench.services, part), method)
    failures = []

    def fail(*arguments: Any) -> Any:
        bench.delivered = False
        failures.append(Outage("unavailable"))
        if len(failures) < 5:
            raise failures[-1]
        return works(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(bench.services, part), method, fail)
        assert bench.complete(DELIVERY) == 0
    assert len(failures) < 5
    assert bench.count("tasks", outcome="given_back") == 1
    bench.delivered = True
    assert bench.complete(DELIVERY) == 1
    assert bench.count("tasks", outcome="succeeded") == 1


@pytest.mark.parametrize("call", ["load", "save"])
def test_a_run_renews_its_lease_while_the_store_does_not_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    status, works = bench.services.status, getattr(bench.services.results, call)
    blocked = []

    def block_once(*arguments: Any) -> Any:
        if not blocked:
            blocked.append(call)
            eventually(lambda: lease(status) != "None", "the run has begun")
            age_lease(status, TAKE_OVER_SECONDS)
            silent = lease(status)
            eventually(lambda: lease(status) != silent, "a sign of life")
            assert bench.complete(replace(DELIVERY, redelivered=True)) == 0
        return works(*arguments)

    monkeypatch.setattr(bench.services.results, call, block_once)
    assert bench.complete(DELIVERY) == 1
    assert bench.count("tasks", outcome="duplicate") == bench.count("tasks", outcome="succeeded") == 1
    assert bench.count("repeated_runs") == 0


def fail() -> None:
    raise EngineDied("it died")


def test_a_copy_of_an_attempt_that_failed_waits_for_the_next_one(bench: Bench) -> None:
    """Its message was lost during the run, so that both this one and that of the next attempt are on their way."""

    def fail_without_message() -> None:
        bench.delivered = False
        fail()

    bench.complete(DELIVERY, fail_without_message)
    bench.delivered = True
    (retry,) = bench.sent
    assert retry.headers["x-attempt"] == 2
    assert bench.count("tasks", outcome="retried") == 1
    copy = DELIVERY
    for level in ("5s", "30s", "120s"):
        assert bench.complete(copy) == 0
        waiting = bench.sent[-1]
        assert (waiting.exchange, waiting.headers.get("x-attempt", 1)) == (f"inference.retry.{level}", 1)
        copy = replace(DELIVERY, headers=waiting.headers)
    # Nothing came of the next attempt: its queue may have been purged.
    assert bench.complete(copy) == 1
    assert bench.count("tasks", outcome="succeeded") == 1


def test_a_failed_run_that_another_one_took_over_ends_nothing(bench: Bench) -> None:
    """Its worker was suspended: the task's end is the other run's."""
    last = replace(DELIVERY, headers={"x-attempt": 5})

    def lose_the_lease() -> None:
        age_lease(bench.services.status, LEASE_SECONDS)
        begin_run(bench.services.status, parse_task(TASK), attempt=5, run="another")
        fail()

    bench.complete(last, lose_the_lease)
    assert bench.sent == []
    assert bench.services.results.load("default", "t") is None
    assert bench.count("tasks", outcome="given_back") == 1
    assert bench.services.status.lease_holder("default", "t") == "another"


def test_without_redis_a_failed_run_decides_only_with_its_message(tmp_path: Path) -> None:
    bench = Bench(StorageSettings(redis_url="redis://127.0.0.1:1/0"), tmp_path)

    def fail_without_message() -> None:
        bench.delivered = False
        fail()

    bench.complete(DELIVERY, fail)
    bench.complete(DELIVERY, fail_without_message)
    assert bench.count("tasks", outcome="retried") == bench.count("tasks", outcome="given_back") == 1
    assert len(bench.sent) == 1
    bench.services.scratch.close()


def test_without_redis_runs_go_on_and_are_counted(tmp_path: Path) -> None:
    bench = Bench(StorageSettings(redis_url="redis://127.0.0.1:1/0"), tmp_path)

    def second_copy() -> None:
        assert bench.complete(DELIVERY) == 1

    assert bench.complete(DELIVERY, second_copy) == 1
    assert bench.count("unleased_runs") == 2
    assert bench.count("repeated_runs") == 1
    kept = bench.services.results.load("default", "t")
    assert kept is not None
    assert kept.status == "succeeded"
    bench.services.scratch.close()
