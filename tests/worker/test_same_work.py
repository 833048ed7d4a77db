"""Tasks that ask for the same at the same time, with the result cache on: one is computed, the others wait for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferq.broker import Delivery
from inferq.consumers.runtime.messages import Done, Failed
from inferq.consumers.runtime.runs import RunAborted
from inferq.consumers.worker import preparation
from inferq.consumers.worker.decision import LEASE_SECONDS
from inferq.consumers.worker.result_cache import ResultCache
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import EngineInfo, parse_task
from inferq.schemas.types import always
from inferq.storage import StorageSettings
from inferq.storage.status.keys import record_key
from tests.worker.test_task_group import Bench, Engine


class OneByOne(Engine):
    """An engine that computes one task at a time; `during` is done meanwhile."""

    def __init__(self, bench: Bench, during: Callable[[], Any] = lambda: None) -> None:
        super().__init__(bench.services)
        self._during = during

    def run(self, task: str, *arguments: object, **more: object) -> Done | Failed:
        self._during()
        return super().run(task, *arguments, **more)


class Site(Bench):
    """A worker whose type is one that the result cache may answer."""

    def __init__(self, storage: StorageSettings, folder: Path) -> None:
        super().__init__(storage, folder)
        task_type = replace(self.services.task_type, cacheable=always)
        self.services.cache = ResultCache(task_type, self.services.store, self.services.results)

    def one(self, engine: Engine, delivery: Delivery | None = None) -> TaskRun:
        """Bring one delivery to its end, as another worker would."""
        consumer = SimpleNamespace(
            ack=lambda *_, **__: None, requeue=lambda _: None, holds=lambda _: True, look_early=lambda: None
        )
        run = TaskRun(
            self.services,
            cast(Any, consumer),
            cast(Any, engine),
            delivery or self.delivery("computed"),
            "normal",
        )
        run.complete()
        assert not engine.held
        return run

    def looked_up(self) -> dict[str, float]:
        """How many tasks were looked up in the cache, by outcome."""
        value = self.services.metrics.registry.get_sample_value
        outcomes = {
            outcome: value("inferq_cache_requests_total", {"task_type": "echo", "outcome": outcome})
            for outcome in ("hit", "miss", "waited")
        }
        return {outcome: count for outcome, count in outcomes.items() if count}

    def cached(self, run: TaskRun) -> bool:
        result = self.result(run.delivery)
        assert result is not None
        assert (result.status, result.output, result.attempts) == ("succeeded", {"payload": "computed"}, 1)
        return result.cached


@pytest.fixture
def site(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(Engine, "info", EngineInfo(name="echo", version="1", model="", device="cpu"))
    site = Site(StorageSettings(redis_url=redis_url), tmp_path)
    site.services.status.write(lambda redis: redis.flushdb())
    yield site
    site.services.status.close()
    site.services.scratch.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task waits on the spot."""
    monkeypatch.setattr(preparation, "SAME_WORK_PATIENCE", 0.0)


def test_of_a_group_that_asks_for_the_same_one_is_computed_and_the_others_take_its_result(site: Site) -> None:
    engine = Engine(site.services)
    runs = site.complete([site.delivery("computed") for _ in range(5)], engine)
    assert [run.outcome for run in runs] == ["succeeded"] * 5
    assert (engine.batches, len(engine.alone)) == ([], 1)
    assert [site.cached(run) for run in runs] == [False, True, True, True, True]
    assert site.sent == []
    assert site.looked_up() == {"miss": 1, "hit": 4}


@pytest.mark.usefixtures("impatient")
def test_those_that_wait_in_a_group_for_work_that_fails_look_again_as_the_same_attempt(site: Site) -> None:
    engine = Engine(site.services)
    runs = site.complete([site.delivery("fails") for _ in range(3)], engine)
    assert sorted(str(run.outcome) for run in runs) == ["retried", "waiting", "waiting"]
    waiting = [message for message in site.sent if "x-attempt" not in message.headers]
    assert [message.exchange for message in waiting] == ["inference.retry.5s"] * 2
    # What failed holds nobody up: both are computed when they come again.
    engine = Engine(site.services)
    copies = [site.deliveries[run.delivery.tag] for run in runs if run.outcome == "waiting"]
    site.acked, site.requeued = [], []
    assert [run.outcome for run in site.complete(copies, engine)] == ["retried"] * 2
    assert engine.batches == [2]


@pytest.mark.usefixtures("impatient")
def test_a_task_whose_work_another_worker_computes_waits_without_its_engine_and_finds_the_result(
    site: Site,
) -> None:
    idle, later = OneByOne(site), site.delivery("computed")
    others: list[TaskRun] = []
    first = site.one(OneByOne(site, lambda: others.append(site.one(idle, later))))
    assert (first.outcome, others[0].outcome) == ("succeeded", "waiting")
    (message,) = site.sent
    assert (message.exchange, message.body, message.headers.get("x-attempt")) == (
        "inference.retry.5s", later.body, None,
    )  # fmt: skip
    again = site.one(idle, later)
    assert (again.outcome, idle.alone) == ("succeeded", [])
    assert (site.cached(first), site.cached(again)) == (False, True)
    assert site.looked_up() == {"miss": 1, "waited": 1, "hit": 1}


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_result_is_in_the_cache_before_nobody_waits_for_its_run_any_more(
    site: Site, monkeypatch: pytest.MonkeyPatch, tasks: int
) -> None:
    entries: list[int] = []
    ended = site.services.status.ended_pipelined

    def ended_pipelined(*arguments: Any, **more: Any) -> Callable[[], bool]:
        entries.append(len(list(site.services.store.list("cache/"))))
        return ended(*arguments, **more)

    monkeypatch.setattr(site.services.status, "ended_pipelined", ended_pipelined)
    if tasks == 1:
        site.one(OneByOne(site))
    else:
        site.complete([site.delivery("computed") for _ in range(tasks)], Engine(site.services))
    assert entries == [1] * tasks


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_short_run_is_waited_for_on_the_spot(site: Site, tasks: int) -> None:
    computing, go_on = threading.Event(), threading.Event()

    def compute() -> None:
        computing.set()
        assert go_on.wait(10)

    first = threading.Thread(target=lambda: site.one(OneByOne(site, compute)))
    first.start()
    assert computing.wait(10)
    idle = OneByOne(site)
    threading.Timer(0.15, go_on.set).start()
    began = time.monotonic()
    taken = [site.delivery("computed") for _ in range(tasks)]
    later = [site.one(idle, taken[0])] if tasks == 1 else site.complete(taken, idle)
    assert time.monotonic() - began < 1
    first.join()
    assert (idle.alone, idle.batches, site.sent) == ([], [], [])
    assert all(run.outcome == "succeeded" and site.cached(run) for run in later)


def test_the_cache_is_asked_for_the_tasks_of_a_group_side_by_side(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = site.services.cache
    assert cache is not None
    find, both = cache.find, threading.Barrier(2)

    def find_together(*arguments: Any) -> Done | None:
        both.wait(5)
        return find(*arguments)

    monkeypatch.setattr(cache, "find", find_together)
    engine = Engine(site.services)
    runs = site.complete([site.delivery("computed"), site.delivery("fails")], engine)
    assert [run.outcome for run in runs] == ["succeeded", "retried"]
    assert engine.batches == [2]


def test_a_task_that_waits_on_the_spot_can_be_cancelled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SAME_WORK_PATIENCE", 60.0)
    waiting, idle = site.delivery("computed"), OneByOne(site)
    task = parse_task(waiting.body)
    site.services.status.submit(task)
    others: list[TaskRun] = []

    def compute() -> None:
        threading.Timer(0.1, site.services.status.request_cancel, ("default", task.task_id)).start()
        began = time.monotonic()
        others.append(site.one(idle, waiting))
        assert time.monotonic() - began < 1

    assert site.one(OneByOne(site, compute)).outcome == "succeeded"
    assert (others[0].outcome, idle.alone) == ("cancelled", [])
    result = site.result(waiting)
    assert result is not None
    assert result.status == "cancelled"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("end", ["dies", "given back", "cancelled"])
def test_when_the_computing_run_ends_without_a_result_the_next_one_computes(site: Site, end: str) -> None:
    delivery, idle = site.delivery("computed"), OneByOne(site)
    task_id = json.loads(delivery.body)["task_id"]
    status = site.services.status

    def end_it() -> None:
        assert site.one(idle).outcome == "waiting"
        if end == "cancelled":
            status.request_cancel("default", task_id)
        elif end == "dies":
            key = record_key("default", task_id)
            at, _, run = status.lease("default", task_id).partition(" ")
            silent = f"{int(at) - round(LEASE_SECONDS * 1000)} {run}"
            status.write(lambda redis: redis.hset(key, "h", silent))
            site.one(idle)
        if end in {"given back", "cancelled"}:
            raise RunAborted("cancelled" if end == "cancelled" else "shutdown")

    site.one(OneByOne(site, end_it), delivery)
    if end != "dies":
        assert site.one(idle).outcome == "succeeded"
    assert len(idle.alone) == 1


def test_without_redis_everything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "info", EngineInfo(name="echo", version="1", model="", device="cpu"))
    site = Site(StorageSettings(redis_url="redis://127.0.0.1:1/0"), tmp_path)
    with closing(site.services.status), closing(site.services.scratch):
        engine = Engine(site.services)
        runs = site.complete([site.delivery("computed") for _ in range(3)], engine)
        assert [run.outcome for run in runs] == ["succeeded"] * 3
        assert engine.batches == [3]


def test_without_the_cache_tasks_do_not_wait_for_each_other(site: Site) -> None:
    site.services.cache = None
    engine = Engine(site.services)
    runs = site.complete([site.delivery("computed") for _ in range(3)], engine)
    assert [run.outcome for run in runs] == ["succeeded"] * 3
    assert engine.batches == [3]
