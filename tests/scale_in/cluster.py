"""A cluster of one Deployment: its pods live in the stand-in of the API server, and each is a real worker process.

KEDA, the HPA, the ReplicaSet and the kubelet are played by their published rules; the guard is the real one.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from inferq.producer.up.part import Part, free_ports
from inferq.producer.up.process import spawn
from tests.forked import ForkedPart
from tests.scale_in.kubernetes_api import NAMESPACE, ApiServer
from tests.scale_in.rules import Pod, Scaler, removal_order

_KUBELET_SECONDS = 0.3
"""From one readiness probe to the next."""
Process = subprocess.Popen[bytes] | ForkedPart
Start = Callable[[str, tuple[str, ...], Mapping[str, str]], Process]
"""Starts `inferq` with arguments and an environment; the first argument names its log."""

_BUSY = re.compile(r"^inferq_worker_busy_slots (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class ScaleIn:
    """Pods that were removed at one moment (POSIX seconds), and the ready ones that stayed."""

    at: float
    removed: tuple[str, ...]
    stayed: tuple[str, ...]
    costs: Mapping[str, int]


@dataclass
class _Pod:
    name: str
    uid: str
    process: Process
    port: int
    created_at: float
    ready_at: float | None = None
    next_probe: float = 0.0
    killed_at: float | None = None


@dataclass
class Cluster:
    """One Deployment of `inferq worker TYPE`. `step` does what is due; times are in seconds of the monotonic clock."""

    start: Start
    api: ApiServer
    scaler: Scaler
    management: httpx.Client
    vhost: str
    env: Mapping[str, str]
    task_type: str = "echo"
    grace: float = 60.0
    pods: list[_Pod] = field(default_factory=list)
    scale_ins: list[ScaleIn] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    started: int = 0

    def __post_init__(self) -> None:
        self._http = httpx.Client(timeout=2)
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="kubelet")

    def close(self) -> None:
        """Kill what still runs."""
        for pod in self.pods:
            pod.process.kill()
            pod.process.wait()
        self._threads.shutdown()
        self._http.close()

    def start_guard(self, kubeconfig: Path) -> Process:
        """Start the real guard, without waiting until it is ready."""
        env = {**self.env, "KUBECONFIG": str(kubeconfig), "INFERQ_SCALE_IN_NAMESPACE": NAMESPACE}
        return self.start("guard", ("scale-in-guard",), env)

    @property
    def live(self) -> list[_Pod]:
        """The pods that are not being deleted."""
        return [pod for pod in self.pods if pod.killed_at is None]

    def messages(self) -> int:
        """Ready and unacknowledged messages, as KEDA's scaler reads them."""
        answer = self.management.get(
            f"/queues/{self.vhost}",
            params={
                "page": 1, "page_size": 100, "pagination": "false", "use_regex": "true",
                "name": rf"^inference\.{self.task_type}\.(high|normal|low)$",
            },
        )  # fmt: skip
        found = answer.raise_for_status().json()
        items = found["items"] if isinstance(found, dict) else found
        return sum(item.get("messages", 0) for item in items)

    def step(self) -> None:
        """One look of all controllers."""
        now = time.monotonic()
        self._probe(now)
        if self.scaler.due(now):
            self.scaler.look(now, self.messages())
        while len(self.live) < self.scaler.replicas:
            self._create(now)
        if (surplus := len(self.live) - self.scaler.replicas) > 0:
            self._remove(surplus)
        self._reap(now)

    def busy(self, pods: list[_Pod]) -> dict[str, bool]:
        """Which pods have a task in hand, as their workers' metrics say now."""
        return dict(zip((pod.name for pod in pods), self._threads.map(self._is_busy, pods), strict=True))

    def _is_busy(self, pod: _Pod) -> bool:
        found = _BUSY.search(self._get(pod.port, "/metrics") or "")
        return found is not None and float(found[1]) > 0

    def _create(self, now: float) -> None:
        self.started += 1
        name = f"worker-{self.task_type}-{self.started}"
        (port,) = free_ports(1)
        made = self.api.add_pod(name, task_type=self.task_type, ready=False)
        env = {**self.env, "INFERQ_WORKER_NAME": name, "INFERQ_PROBE_PORT": str(port)}
        process = self.start(name, ("worker", self.task_type), env)
        self.pods.append(_Pod(name, made["metadata"]["uid"], process, port, now))
        self.events.append((now, f"{name} started"))

    def _probe(self, now: float) -> None:
        due = [pod for pod in self.live if now >= pod.next_probe]
        for pod, answer in zip(
            due, self._threads.map(lambda pod: self._get(pod.port, "/readyz"), due), strict=True
        ):
            pod.next_probe = now + _KUBELET_SECONDS
            ready = answer is not None
            if ready and pod.ready_at is None:
                pod.ready_at = time.monotonic()
                self.api.set_ready(pod.name)
                self.events.append((pod.ready_at, f"{pod.name} ready"))
            elif not ready and pod.ready_at is not None:
                pod.ready_at = None
                self.api.set_ready(pod.name, False)

    def _remove(self, count: int) -> None:
        """Choose as a ReplicaSet does, by what the API server has at this moment."""
        live = self.live
        candidates = [
            Pod(
                pod.name, pod.uid, "node", ready_at=pod.ready_at, created_at=pod.created_at,
                cost=int(self.api.cost(pod.name) or 0),
            )
            for pod in live
        ]  # fmt: skip
        chosen = {pod.name for pod in removal_order(candidates, time.monotonic())[:count]}
        stayed = tuple(pod.name for pod in live if pod.name not in chosen and pod.ready_at is not None)
        costs = {pod.name: pod.cost for pod in candidates}
        if stayed:
            self.scale_ins.append(ScaleIn(time.time(), tuple(chosen), stayed, costs))
        for pod in live:
            if pod.name in chosen:
                self.api.begin_deletion(pod.name)
                pod.process.send_signal(signal.SIGTERM)
                pod.killed_at = time.monotonic()
        self.events.append((time.monotonic(), f"{count} removed"))

    def _reap(self, now: float) -> None:
        for pod in [pod for pod in self.pods if pod.killed_at is not None]:
            if pod.process.poll() is not None:
                self.pods.remove(pod)
                self.api.remove_pod(pod.name)
                self.events.append((now, f"{pod.name} gone"))
            elif pod.killed_at is not None and now - pod.killed_at > self.grace:
                pod.process.kill()

    def _get(self, port: int, path: str) -> str | None:
        try:
            answer = self._http.get(f"http://127.0.0.1:{port}{path}")
        except httpx.HTTPError:
            return None
        return answer.text if answer.status_code == 200 else None


def result_of(store: Path, task_id: str) -> dict[str, Any] | None:
    """The stored result of a task; None before it ended."""
    try:
        found: dict[str, Any] = json.loads(
            (store / f"tasks/default/{task_id}/result.json").read_text("utf-8")
        )
    except (FileNotFoundError, ValueError):
        return None
    return found


def programs(logs: Path) -> Start:
    """Starts new interpreters, which end with this process."""
    # The kernel ends a child when the thread that started it ends.
    spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")

    def start(name: str, arguments: tuple[str, ...], env: Mapping[str, str]) -> Process:
        argv = (sys.executable, "-P", "-m", "inferq.producer.cli", *arguments)
        part = Part(name=name, argv=argv, env=env, probe=lambda: None)
        return spawner.submit(spawn, part, logs / f"{name}.log").result()

    return start


def forks(logs: Path) -> Start:
    """Forks a process that has imported inferq: far cheaper, and otherwise the same."""
    return lambda name, arguments, env: ForkedPart(*arguments, env=env, log=logs / f"{name}.log")
