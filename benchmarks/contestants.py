"""The three queues behind one interface: publish, run a worker, read when each task's body started."""

from __future__ import annotations

import itertools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clock import ClockOutput

from benchmarks.site import Site
from inferq.broker import Publisher, task_message, topology_for
from inferq.schemas import new_task_id, parse_task

PAYLOAD = "x" * 100


class Contestant(ABC):
    """A queue to compare. `publish` returns when all tasks are confirmed; `started` waits for a task's result."""

    name: str

    @abstractmethod
    def publish(self, count: int) -> Sequence[Any]:
        """Publish `count` tasks, each confirmed. Gives the handles that `started` takes."""

    @abstractmethod
    def started(self, task: Any) -> float:
        """Wait for the task's result. Gives the start of the task's body (Unix seconds)."""

    @abstractmethod
    def worker(self) -> AbstractContextManager[object]:
        """A worker that takes one task at a time."""

    def close(self) -> None:
        return


class Inferq(Contestant):
    """inferq. `lanes` are the worker's priorities; `fsync`: whether results wait for the disk.

    `ahead`: whether the worker prefetches a second task during a run. `batch`: how many tasks the engine computes
    together.
    """

    def __init__(
        self,
        site: Site,
        *,
        lanes: str = "normal",
        fsync: bool = True,
        ahead: bool = False,
        batch: int = 1,
    ) -> None:
        notes = ["one lane" if "," not in lanes else "three lanes"]
        notes += [f"batches of {batch}"] * (batch > 1)
        notes += ["tasks taken ahead"] * ahead + ["results without fsync"] * (not fsync)
        self.name = ", ".join(["inferq", *notes])
        self._site = site
        self._settings = {
            "INFERQ_LANES": lanes,
            "INFERQ_STORE_FSYNC": str(fsync).lower(),
            "INFERQ_TAKE_AHEAD": str(ahead).lower(),
            "INFERQ_BATCH_SIZE": str(batch),
        }
        self._results = site.results()
        self._numbers = itertools.count()
        self._publisher = Publisher(site.broker(), name="bench", topology=topology_for(["clock"]))
        self._publisher.start()
        self._publisher.wait_connected(20)
        self._prefix = new_task_id()

    def publish(self, count: int) -> list[str]:
        ids = [f"{self._prefix}-{next(self._numbers)}" for _ in range(count)]
        futures = [
            self._publisher.publish(
                task_message(parse_task({"task_id": i, "task_type": "clock", "payload": PAYLOAD}))
            )
            for i in ids
        ]
        for future in futures:
            future.result(60)
        return ids

    def started(self, task: str) -> float:
        while (result := self._results.load("default", task)) is None:
            time.sleep(0.001)
        if result.error is not None:
            raise RuntimeError(f"{task}: {result.error}")
        return ClockOutput.model_validate(result.output).started

    def worker(self) -> AbstractContextManager[object]:
        return self._site.inferq_worker("clock", **self._settings)

    def close(self) -> None:
        self._publisher.close()


class Celery(Contestant):
    def __init__(self, site: Site) -> None:
        import celery

        from benchmarks.celery_app import clock

        self.name = f"Celery {celery.__version__}"
        self._site = site
        self._clock = clock

    def publish(self, count: int) -> list[Any]:
        return [self._clock.delay(PAYLOAD) for _ in range(count)]

    def started(self, task: Any) -> float:
        return float(task.get(timeout=120, interval=0.001)["started"])

    def worker(self) -> AbstractContextManager[object]:
        program = str(Path(sys.executable).with_name("celery"))
        return self._site.process(
            program, "-A", "benchmarks.celery_app", "worker", "--pool=prefork", "--concurrency=1",
            "--loglevel=WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat",
        )  # fmt: skip


class Dramatiq(Contestant):
    def __init__(self, site: Site) -> None:
        from importlib.metadata import version

        from benchmarks.dramatiq_app import broker, clock

        self.name = f"Dramatiq {version('dramatiq')}"
        self._site = site
        self._clock = clock
        self._broker = broker

    def publish(self, count: int) -> list[Any]:
        return [self._clock.send(PAYLOAD) for _ in range(count)]

    def started(self, task: Any) -> float:
        from dramatiq.results import ResultMissing

        while True:  # its blocking wait is limited by the Redis client's socket timeout
            try:
                return float(task.get_result()["started"])
            except ResultMissing:
                time.sleep(0.001)

    def worker(self) -> AbstractContextManager[object]:
        program = str(Path(sys.executable).with_name("dramatiq"))
        return self._site.process(
            program, "benchmarks.dramatiq_app", "--processes", "1", "--threads", "1",
            dramatiq_queue_prefetch="1",
        )  # fmt: skip

    def close(self) -> None:
        self._broker.close()
