"""Deliveries that are brought to their ends together: each its own way, and nothing before it is durable."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.broker import Delivery, Message
from inferq.consumers.runtime.messages import Alone, Done, Failed, Job
from inferq.consumers.runtime.process import EngineDied
from inferq.consumers.runtime.runs import BatchHooks, RunAborted
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.task_group import TaskGroup
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import Result, parse_task
from inferq.storage import StorageSettings, UnreadableResult
from inferq.storage.status.keys import record_key
from tests.runs import begin_run
from tests.worker.bench import services_at

Fate = Literal["computed", "fails", "invalid", "cancelled", "ended before", "unreadable", "no task"]
FATES: tuple[Fate, ...] = (
    "computed", "fails", "invalid", "cancelled", "ended before", "unreadable", "no task"
)  # fmt: skip


class Engine:
    """An engine that is free, its lease, and what becomes of a batch: `fault` is that of the whole batch."""

    info, shared, held, group_size = None, False, False, 8

    def __init__(self, services: WorkerServices, fault: str | None = None, *, dies: bool = False) -> None:
        self.engine = self
        self.usable = True
        self.batches: list[int] = []
        self.alone: list[str] = []
        self.noted: list[tuple[Mapping[int, int], int]] = []
        self._services = services
        self._fault = fault
        self._dies = dies

    def acquire(self, *_: object, **__: object) -> bool:
        self.held = True
        return True

    def release(self) -> None:
        self.held = False

    finish = step_aside = release

    def computing(self, **_: object) -> Any:
        return nullcontext()

    def prepare(self, _task: str) -> None:
        return

    def note_batches(self, sizes: Mapping[int, int], *, exhausted: int = 0) -> None:
        self.noted.append((dict(sizes), exhausted))

    def run_batch(self, jobs: Sequence[Job], *, watch: BatchHooks, **_: object) -> None:
        assert self.held
        self.batches.append(len(jobs))
        cancelled = watch.aborts()
        for place, job in enumerate(jobs):
            answer: Done | Failed | RunAborted | Alone = answered(job.task, len(jobs))
            if place in cancelled:
                answer = RunAborted(cancelled[place])
            elif self._fault is not None:
                answer = Alone(place=place, reason=cast(Any, self._fault), message="the whole batch failed")
            watch.ended(place, answer)
        self.usable = not self._dies

    def run(self, task: str, *_: object, **__: object) -> Done | Failed:
        assert self.held
        if self._fault == "engine_died":
            raise EngineDied("it ends by this task alone")
        self.alone.append(json.loads(task)["task_id"])
        return answered(task, 1)


def answered(task: str, size: int) -> Done | Failed:
    fate = json.loads(task)["payload"]
    if fate in {"fails", "invalid"}:
        return Failed(code=f"it_{fate}", message="", invalid=fate == "invalid", seconds=0.1, batch_size=size)
    return Done(output=json.dumps({"payload": fate}).encode(), seconds=size * 0.5, batch_size=size)


class Bench:
    """A worker's services; a consumer that checks what is on record when it settles."""

    def __init__(self, storage: StorageSettings, folder: Path) -> None:
        self.services = services_at(storage, folder, self)
        self.sent: list[Message] = []
        self.acked: list[int] = []
        self.requeued: list[int] = []
        self.deliveries: dict[int, Delivery] = {}
        self.tags = iter(range(1, 10_000))
        self.urgent = False

    def publish(self, message: Message, **_: object) -> Future[None]:
        self.sent.append(message)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def delivery(self, fate: Fate, task_id: str | None = None, *, redelivered: bool = False) -> Delivery:
        task_id = task_id or uuid.uuid4().hex
        body: Any = {"task_id": task_id, "task_type": "echo", "payload": fate}
        task = parse_task(body)
        if fate == "cancelled":
            self.services.status.submit(task)
            self.services.status.request_cancel(task.tenant, task_id)
        elif fate == "ended before":
            earlier = Result(
                task_id=task_id, task_type="echo", tenant="default", status="succeeded", attempts=1,
                finished_at=datetime.now(UTC), digest=task.digest(), output={"payload": "earlier"},
            )  # fmt: skip
            assert self.services.results.save(earlier) is earlier
        elif fate == "unreadable":
            key = f"tasks/default/{task_id}/result.json"
            self.services.store.put(key, b"not JSON", content_type="application/json")
        tag = next(self.tags)
        self.deliveries[tag] = Delivery(
            queue="inference.echo.normal", tag=tag, epoch=1,
            body=b"no JSON" if fate == "no task" else json.dumps(body).encode(),
            routing_key="task_type.echo.normal", headers={}, redelivered=redelivered,
        )  # fmt: skip
        return self.deliveries[tag]

    # The consumer.

    def pause(self) -> None:
        self.paused = True

    def look_early(self) -> None:
        return

    def urgent_waits(self, _queue: str) -> bool:
        return self.urgent

    def holds(self, _delivery: Delivery) -> bool:
        return True

    def ack(self, delivery: Delivery, **_: object) -> None:
        self.ack_all([delivery])

    def ack_all(self, deliveries: Sequence[Delivery], **_: object) -> None:
        for delivery in deliveries:
            self.acked.append(delivery.tag)
            assert self.is_safe(delivery), "it was acknowledged before what it leaves is durable"

    def requeue(self, delivery: Delivery) -> None:
        self.requeue_all([delivery])

    def requeue_all(self, deliveries: Sequence[Delivery]) -> None:
        self.requeued += [delivery.tag for delivery in deliveries]

    def is_safe(self, delivery: Delivery) -> bool:
        """Whether a record or a message stands for the delivery."""
        copies = [message.body for message in self.sent if message.exchange != "inference.jobs"]
        if delivery.body in copies:
            return True
        return self.result(delivery) is not None

    def result(self, delivery: Delivery) -> Result | None:
        return self.services.results.load("default", json.loads(delivery.body)["task_id"])

    def complete(
        self,
        deliveries: Sequence[Delivery],
        engine: Engine,
        later: Sequence[Delivery] = (),
    ) -> list[TaskRun]:
        waiting = list(later)

        def runs(taken: Sequence[Delivery]) -> list[TaskRun]:
            return [
                TaskRun(self.services, cast(Any, self), cast(Any, engine), delivery, "normal")
                for delivery in taken
            ]

        def more(most: int) -> list[TaskRun]:
            taken, waiting[:] = waiting[:most], waiting[most:]
            return runs(taken)

        group = TaskGroup(self.services, cast(Any, self), cast(Any, engine), runs(deliveries), more)
        group.complete()
        assert sorted(self.acked + self.requeued) == sorted(run.delivery.tag for run in group.runs)
        return group.runs


@pytest.fixture
def bench(redis_url: str, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(StorageSettings(redis_url=redis_url), tmp_path)
    yield bench
    bench.services.status.close()
    bench.services.scratch.close()


EXPECTED = {
    "computed": "succeeded", "fails": "retried", "invalid": "failed", "cancelled": "cancelled",
    "ended before": "skipped", "unreadable": "failed", "no task": "failed",
}  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(FATES), min_size=1, max_size=6), st.sampled_from([None, "raised"]))
def test_each_task_of_a_group_ends_its_own_way(bench: Bench, fates: list[Fate], fault: str | None) -> None:
    bench.acked, bench.requeued, bench.sent = [], [], []
    engine = Engine(bench.services, fault)
    runs = bench.complete([bench.delivery(fate) for fate in fates], engine)
    assert [run.outcome for run in runs] == [EXPECTED[fate] for fate in fates]
    computing = [fate for fate in fates if fate in {"computed", "fails", "invalid"}]
    assert engine.batches == ([len(computing)] if len(computing) > 1 else [])
    for run, fate in zip(runs, fates, strict=True):
        if fate != "computed":
            continue
        result = bench.result(run.delivery)
        assert result is not None
        assert (result.output, result.attempts) == ({"payload": "computed"}, 1)
        together = len(computing) > 1 and fault is None
        assert result.batch_size == (len(computing) if together else 1)
        assert result.timings.inference == pytest.approx(0.5)  # its share


@pytest.mark.parametrize("reason", ["engine_died", "time_limit", "out_of_memory"])
def test_what_ends_the_engine_of_a_batch_costs_none_of_its_tasks_an_attempt(
    bench: Bench, reason: str
) -> None:
    engine = Engine(bench.services, reason, dies=True)
    runs = bench.complete([bench.delivery("computed") for _ in range(3)], engine)
    assert [run.outcome for run in runs] == ["given_back"] * 3
    assert bench.sent == []
    assert engine.noted == [({}, 3 if reason == "out_of_memory" else 0)]
    # They come back, and have no company: only one that ends the engine alone is charged.
    engine = Engine(bench.services)
    again = [
        bench.delivery("computed", json.loads(run.delivery.body)["task_id"], redelivered=True) for run in runs
    ]
    bench.acked, bench.requeued = [], []
    again_runs = bench.complete(again, engine)
    assert engine.batches == []
    assert len(engine.alone) == 3
    assert [run.outcome for run in again_runs] == ["succeeded"] * 3
    results = [bench.result(delivery) for delivery in again]
    assert [result.attempts for result in results if result is not None] == [1] * 3


def test_only_the_task_that_ends_the_engine_alone_is_charged(bench: Bench) -> None:
    engine = Engine(bench.services, "engine_died")
    (first, second) = bench.complete([bench.delivery("computed") for _ in range(2)], engine)
    assert (first.outcome, second.outcome) == ("retried", "retried")
    assert [message.headers["x-engine-deaths"] for message in bench.sent] == [1, 1]


def test_a_task_that_may_have_ended_a_worker_is_computed_without_company(bench: Bench) -> None:
    suspect = bench.delivery("computed", redelivered=True)
    task = parse_task(suspect.body)
    begin_run(bench.services.status, task, worker="gone")
    key = record_key("default", task.task_id)
    # That worker is dead: its lease gives no sign of life any more.
    bench.services.status.write(lambda redis: redis.hdel(key, "h"))
    engine = Engine(bench.services)
    runs = bench.complete([bench.delivery("computed"), suspect, bench.delivery("computed")], engine)
    assert [run.outcome for run in runs] == ["succeeded"] * 3
    assert engine.alone == [task.task_id]
    assert engine.batches == [2]


def test_after_a_failed_batch_each_result_is_recorded_before_the_next_task_runs(bench: Bench) -> None:
    deliveries = [bench.delivery("computed") for _ in range(3)]
    recorded: list[int] = []

    class OneByOne(Engine):
        def run(self, task: str, *more: object, **options: object) -> Done | Failed:
            recorded.append(sum(bench.result(delivery) is not None for delivery in deliveries))
            return super().run(task, *more, **options)

    bench.complete(deliveries, OneByOne(bench.services, "raised"))
    assert recorded == [0, 1, 2]


def test_tasks_that_arrive_join_while_the_group_waits_for_the_engine(bench: Bench) -> None:
    class Busy(Engine):
        asked = 0

        def acquire(self, *_: object, **__: object) -> bool:
            self.asked += 1
            self.held = self.asked > 6
            return self.held

    engine = Busy(bench.services)
    first, later = bench.delivery("computed"), [bench.delivery("computed") for _ in range(9)]
    runs = bench.complete([first, bench.delivery("fails")], engine, later)
    assert engine.batches == [8]  # as many as the engine computes together, no more
    assert [run.outcome for run in runs].count("succeeded") == 7


def test_a_task_of_a_waiting_group_is_cancelled_within_a_second(bench: Bench) -> None:
    leaving = bench.delivery("computed")
    task = parse_task(leaving.body)
    bench.services.status.submit(task)

    class Busy(Engine):
        asked = 0

        def acquire(self, *_: object, **__: object) -> bool:
            self.asked += 1
            if self.asked == 2:
                bench.services.status.request_cancel("default", task.task_id)
            ended = bench.services.results.load("default", task.task_id)
            self.held = ended is not None
            return self.held

    runs = bench.complete([leaving, bench.delivery("computed")], Busy(bench.services))
    assert [run.outcome for run in runs] == ["cancelled", "succeeded"]


def test_a_worker_that_stops_gives_a_waiting_group_back(bench: Bench) -> None:
    class Busy(Engine):
        def acquire(self, *_: object, **__: object) -> bool:
            bench.services.stop(60)
            return False

    runs = bench.complete([bench.delivery("computed") for _ in range(2)], Busy(bench.services))
    assert [run.outcome for run in runs] == ["given_back"] * 2
    assert len(bench.requeued) == 2


def test_a_group_that_waits_gives_way_to_a_more_urgent_task(bench: Bench) -> None:
    bench.urgent = True

    class Busy(Engine):
        def acquire(self, *_: object, **__: object) -> bool:
            return False

    runs = bench.complete([bench.delivery("computed") for _ in range(2)], Busy(bench.services))
    assert [run.outcome for run in runs] == ["given_back"] * 2


def test_a_batch_whose_grace_period_is_over_is_given_back(bench: Bench) -> None:
    class Ending(Engine):
        def run_batch(self, jobs: Sequence[Job], *, watch: BatchHooks, **more: object) -> None:
            bench.services.stop(0)
            super().run_batch(jobs, watch=watch, **more)

    runs = bench.complete([bench.delivery("computed") for _ in range(2)], Ending(bench.services))
    assert [run.outcome for run in runs] == ["given_back"] * 2
    assert all(bench.result(run.delivery) is None for run in runs)


def test_a_fault_of_our_own_in_a_step_for_all_fails_attempts_and_settles_every_delivery(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.services.results, "save_many", lambda _: 1 / 0)
    runs = bench.complete([bench.delivery("computed") for _ in range(2)], Engine(bench.services))
    assert [run.outcome for run in runs] == ["retried"] * 2


def test_a_record_that_cannot_be_read_fails_its_own_task_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = bench.services.results.save_many

    def save_many(successes: Sequence[Any]) -> list[Result | UnreadableResult]:
        return [UnreadableResult("written by a later version"), *save(successes[1:])]

    monkeypatch.setattr(bench.services.results, "save_many", save_many)
    runs = bench.complete([bench.delivery("computed") for _ in range(2)], Engine(bench.services))
    assert [run.outcome for run in runs] == ["failed", "succeeded"]
