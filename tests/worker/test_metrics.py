"""What a worker counts: how tasks end, which attempts fail where, what engines wait for, what tenants use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from inferq.broker import Delivery
from inferq.consumers.runtime.messages import Done, Failed
from inferq.consumers.runtime.process import EngineDied, RunAborted
from inferq.consumers.worker.engine_clock import EngineClock
from inferq.consumers.worker.task_run import TaskRun
from inferq.storage import StorageSettings
from inferq.storage.status.usage import Usage
from tests.worker.bench import services_at

DONE = Done(output=b'{"payload": 1}', artifacts={}, seconds=0.0)
INVALID = Failed(code="no_face", message="no face", invalid=True, seconds=0.0)
FAILED = Failed(code="engine_error", message="broken", invalid=False, seconds=0.0)


class Engine:
    """An engine that is always free, and its lease."""

    usable, info, shared, held = True, None, False, True
    computing = nullcontext

    def __init__(self, answer: Done | Failed | Exception) -> None:
        self.engine = self
        self._answer = answer

    def acquire(self, *_: object, **__: object) -> bool:
        return True

    def release(self) -> None:
        return

    step_aside = finish = release

    def prepare(self, _task: str) -> None:
        return

    def run(self, *_arguments: Any, **_more: Any) -> Done | Failed:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Bench:
    """A worker's services, and deliveries in one process."""

    def __init__(self, storage: StorageSettings, folder: Path) -> None:
        self.services = services_at(storage, folder, self)

    def publish(self, _message: object) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def complete(
        self,
        answer: Done | Failed | Exception = DONE,
        *,
        body: bytes = b"",
        attempt: int = 1,
        redrives: int = 0,
        **task: Any,
    ) -> None:
        task = {"task_id": "t", "task_type": "echo", "payload": 1, **task}
        delivery = Delivery(
            queue="inference.echo.normal", tag=1, epoch=1, body=body or json.dumps(task).encode(),
            routing_key="task_type.echo.normal", headers={"x-attempt": attempt, "x-redrives": redrives},
            redelivered=False,
        )  # fmt: skip
        consumer = SimpleNamespace(
            ack=lambda *_, **__: None, requeue=lambda _: None, holds=lambda _: True, look_early=lambda: None
        )
        TaskRun(self.services, cast(Any, consumer), cast(Any, Engine(answer)), delivery, "normal").complete()

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples of a counter by the values of their labels, without the task type."""
        return {
            tuple(value for label, value in sample.labels.items() if label != "task_type"): sample.value
            for family in self.services.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name
        }

    def usage(self) -> list[Usage]:
        return self.services.status.usage([datetime.now(UTC).date()])


@pytest.fixture
def bench(redis_url: str, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(StorageSettings(redis_url=redis_url), tmp_path)
    yield bench
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    bench.services.status.close()
    bench.services.scratch.close()


@pytest.mark.parametrize(
    ("act", "ended", "failures"),
    [
        (lambda bench: bench.complete(), ("succeeded", ""), []),
        (lambda bench: bench.complete(INVALID), ("failed", "no_face"), [("inference", "no_face")]),
        (lambda bench: bench.complete(FAILED), None, [("inference", "engine_error")]),
        (lambda bench: bench.complete(FAILED, attempt=5), ("failed", "engine_error"),
         [("inference", "engine_error")]),
        (lambda bench: bench.complete(EngineDied("gone")), None, [("inference", "engine_died")]),
        (lambda bench: bench.complete(RunAborted("cancelled")), ("cancelled", "cancelled"), []),
        (lambda bench: bench.complete(RunAborted("shutdown")), None, []),
        (lambda bench: bench.complete(expires_at="2026-01-01T00:00:00Z"), ("failed", "expired"),
         [("queued", "expired")]),
        (lambda bench: bench.complete(body=b"no task"), None, [("parse", "not_json")]),
        (lambda bench: bench.complete(body=b'{"task_id": "t", "task_type": "echo", "nonsense": 1}'),
         ("failed", "invalid_task"), [("parse", "invalid_task")]),
    ],
    ids=["success", "invalid", "retry", "last attempt", "engine died", "cancelled", "shutdown", "expired",
         "no task", "unreadable"],
)  # fmt: skip
def test_each_end_is_counted_with_its_code_and_each_failed_attempt_with_its_stage(
    bench: Bench,
    act: Callable[[Bench], None],
    ended: tuple[str, str] | None,
    failures: list[tuple[str, str]],
) -> None:
    for _ in range(2):  # the second copy finds the end on record
        act(bench)
    assert bench.counted("inferq_tasks_ended_total") == ({ended: 1.0} if ended else {})
    times = 2.0 if failures and failures[0][0] == "parse" else 1.0  # what is no task has no end to find
    assert bench.counted("inferq_task_failures_total") == dict.fromkeys(failures, times)


def test_each_dead_letter_is_counted_also_that_of_a_task_that_was_sent_back(bench: Bench) -> None:
    bench.services.metrics.add_engine("echo")
    counted = partial(bench.counted, "inferq_worker_dead_letters_total")
    assert counted() == {(): 0.0}  # a rise from an absent series counts nothing
    bench.complete(INVALID)
    bench.complete(INVALID)  # another copy, which finds the end on record
    bench.complete(FAILED, task_id="retried")
    bench.complete(task_id="late", expires_at="2026-01-01T00:00:00Z")
    assert counted() == {(): 1.0}
    bench.complete(INVALID, redrives=1)
    bench.complete(body=b"no task")
    assert counted() == {(): 3.0}


def test_a_tenants_tasks_and_engine_seconds_are_counted_and_recorded_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("inferq.consumers.worker.computation.time", SimpleNamespace(monotonic=lambda: now[0]))

    def run(*_arguments: Any, **_more: Any) -> Any:
        now[0] += 2.5
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(Engine, "run", run)
    answers = iter(
        [FAILED, DONE, EngineDied("gone"), INVALID, RunAborted("cancelled"), RunAborted("shutdown")]
    )
    for task_id, attempt in (("a", 1), ("a", 2), ("a", 2), ("b", 1), ("c", 1), ("d", 1), ("e", 1)):
        bench.complete(task_id=task_id, attempt=attempt, tenant="acme")
    assert next(answers, None) is None
    today = datetime.now(UTC).date()
    # The run that a stop of the worker ends is repeated elsewhere: the tenant pays for the other one.
    assert bench.usage() == [
        Usage(today, "acme", "echo", succeeded=1, failed=1, cancelled=1, retried=2, engine_seconds=12.5)
    ]
    assert bench.counted("inferq_tenant_engine_seconds_total") == {("acme",): 15.0}
    assert bench.counted("inferq_tenant_tasks_total") == {("acme",): 3.0}


# The engine's clock.


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_seconds_of_an_engine_are_those_of_its_task() -> None:
    time = Time()
    clock = EngineClock(time)
    time.now += 100  # no engine is loaded: nothing counts
    clock.load(True)
    for seconds, before, after in (
        (8, "task", "input"), (4, "input", "computing"), (2, "computing", "result"), (1, "result", "task"),
    ):  # fmt: skip
        time.now += seconds
        clock.move(cast(Any, before), cast(Any, after))
    assert clock.seconds() == {"task": 8, "input": 4, "computing": 2, "result": 1}
    time.now += 16  # what goes on counts before it ends
    assert clock.seconds()["task"] == 24
    clock.load(False)
    time.now += 100
    assert sum(clock.seconds().values()) == 31


@pytest.mark.parametrize(
    ("first", "second", "counted"),
    [
        ("computing", "input", "computing"), ("computing", "result", "computing"), ("input", "result", "input"),
        ("result", "task", "task"), ("input", "task", "input"), ("result", "result", "result"),
    ],
)  # fmt: skip
def test_with_two_threads_an_engine_waits_for_the_task_that_comes_first(
    first: Any, second: Any, counted: Any
) -> None:
    time = Time()
    clock = EngineClock(time)
    clock.join()
    clock.load(True)
    clock.move("task", first)
    clock.move("task", second)
    time.now += 3
    assert {step: seconds for step, seconds in clock.seconds().items() if seconds} == {counted: 3}
