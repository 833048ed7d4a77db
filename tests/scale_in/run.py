"""One run: a seed's load on a cluster, with the guard or without it."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from inferq.broker import BrokerSettings, Publisher, task_message, topology_for
from inferq.schemas import parse_task
from tests.conftest import RabbitMQ
from tests.scale_in.cluster import Cluster, ScaleIn, Start, result_of
from tests.scale_in.kubernetes_api import ApiServer
from tests.scale_in.load import PlannedTask, draw
from tests.scale_in.rules import Scaler, Timing
from tests.waiting import eventually

Variant = Literal["neither", "guard only", "guard and order"]
VARIANTS: tuple[Variant, ...] = ("neither", "guard only", "guard and order")

TIMING = Timing(poll=5 / 8, cooldown=60 / 8, sync=15 / 8, stabilization=60 / 8)
"""An eighth of the usual times; the guard and the heartbeats keep theirs, which is harder for them."""
MOST_PODS = 5
_STEP_SECONDS = 0.1
_DRAIN_SECONDS = 120.0


@dataclass(frozen=True)
class Row:
    """What a run came to."""

    variant: Variant
    seed: int
    scale_ins: int
    removed: int
    busy: int
    avoidable: int
    settled: int
    tasks: int
    results: int
    repeated: int
    pods: int
    patches: int
    seconds: float
    notes: list[str]


def play(
    variant: Variant,
    seed: int,
    *,
    scale_ins: int,
    rabbitmq: RabbitMQ,
    redis_url: str,
    folder: Path,
    start: Start,
    most_seconds: float = 600.0,
    say: Callable[[str], object] = lambda _text: None,
) -> Row:
    """Run until pods were removed at so many moments, then until all tasks have ended and no pod is left."""
    folder.mkdir()
    with fresh_figures(rabbitmq), rabbitmq.vhost("scale-in") as amqp_url, ApiServer() as api:
        store = folder / "store"
        env = os.environ | {
            "INFERQ_AMQP_URL": amqp_url,
            "INFERQ_REDIS_URL": redis_url,
            "INFERQ_STORE_URL": store.as_uri(),
            "INFERQ_SCRATCH_DIR": str(folder),
            "INFERQ_GRACE_SECONDS": "30",
            "INFERQ_OLDEST_FIRST": str(variant == "guard and order").lower(),
        }
        scaler = Scaler(TIMING, MOST_PODS)
        vhost = amqp_url.rpartition("/")[2]
        cluster = Cluster(start, api, scaler, rabbitmq.management, vhost, env)
        guard = None
        if variant != "neither":
            guard = cluster.start_guard(api.write_kubeconfig(folder / "kubeconfig"))
            eventually(lambda: api.watches == 1, "a guard that watches pods")
        publisher = Publisher(BrokerSettings(amqp_url=amqp_url), name="load", topology=topology_for(["echo"]))
        publisher.start()
        sent: list[PlannedTask] = []
        try:
            plan = draw(seed)
            task = next(plan)
            began = time.monotonic()
            while len(cluster.scale_ins) < scale_ins and time.monotonic() - began < most_seconds:
                while task.due <= time.monotonic() - began:
                    body = {"task_id": task.name, "task_type": "echo", "delay": task.seconds}
                    publisher.publish(task_message(parse_task(body))).result(30)
                    sent.append(task)
                    task = next(plan)
                known = len(cluster.scale_ins)
                cluster.step()
                if len(cluster.scale_ins) > known and len(cluster.scale_ins) % 10 == 0:
                    say(f"{variant}, seed {seed}: {len(cluster.scale_ins)} scale-ins")
                time.sleep(_STEP_SECONDS)
            end = time.monotonic() + _DRAIN_SECONDS
            while time.monotonic() < end and (cluster.pods or _left(store, sent)):
                cluster.step()
                time.sleep(_STEP_SECONDS)
        finally:
            publisher.close()
            cluster.close()
            if guard is not None:
                guard.terminate()
                guard.wait(30)
        results = [result_of(store, each.name) for each in sent]
        runs = [Run.of(found) for found in results if found is not None]
        judged = [judge(each, runs) for each in cluster.scale_ins]
        row = Row(
            variant=variant,
            seed=seed,
            scale_ins=len(cluster.scale_ins),
            removed=sum(len(each.removed) for each in cluster.scale_ins),
            busy=sum(each.busy for each in judged),
            avoidable=sum(each.avoidable for each in judged),
            settled=sum(each.settled for each in judged),
            tasks=len(sent),
            results=sum(found is not None for found in results),
            repeated=sum(found is not None and found["attempts"] > 1 for found in results),
            pods=cluster.started,
            patches=len(api.patches()),
            seconds=round(time.monotonic() - began, 1),
            notes=[each.note for each in judged if each.avoidable],
        )
    shutil.rmtree(store, ignore_errors=True)
    return row


class Run(NamedTuple):
    """A run, by its result: its worker, and when it began and ended (POSIX seconds)."""

    worker: str
    began: float
    ended: float

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Run:
        moments = (datetime.fromisoformat(result[name]).timestamp() for name in ("started_at", "finished_at"))
        return cls(result["worker"], *moments)


class Judged(NamedTuple):
    """Of the pods that were removed at one moment, the busy ones: all, those that were removed while another pod was
    idle, and those while one had been idle for a second: a cost is about half a second behind."""

    busy: int
    avoidable: int
    settled: int
    note: str


def judge(scale_in: ScaleIn, runs: Sequence[Run]) -> Judged:
    """Judge a choice by all runs, which are known afterwards."""

    def idle_for(pod: str) -> float:
        own = [run for run in runs if run.worker == pod]
        if any(run.began <= scale_in.at < run.ended for run in own):
            return 0.0
        return min((scale_in.at - run.ended for run in own if run.ended <= scale_in.at), default=math.inf)

    idle = {pod: idle_for(pod) for pod in (*scale_in.removed, *scale_in.stayed)}
    busy = sum(not idle[pod] for pod in scale_in.removed)
    others = [idle[pod] for pod in scale_in.stayed]
    return Judged(
        busy,
        min(busy, sum(seconds > 0 for seconds in others)),
        min(busy, sum(seconds >= 1 for seconds in others)),
        f"of {scale_in.costs} were removed {scale_in.removed}; seconds idle: {idle}",
    )


@contextmanager
def fresh_figures(rabbitmq: RabbitMQ) -> Iterator[None]:
    """Let management figures be 5/8 s old at most: an eighth of the usual, as all times here."""

    def set_both(milliseconds: int) -> None:
        names = "[collect_statistics_interval, quorum_tick_interval]"
        rabbitmq.control("eval", f"[application:set_env(rabbit, N, {milliseconds}) || N <- {names}].")

    set_both(625)
    yield
    set_both(5000)


def _left(store: Path, sent: list[PlannedTask]) -> bool:
    return any(result_of(store, task.name) is None for task in reversed(sent))
