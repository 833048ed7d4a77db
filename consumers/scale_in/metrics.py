"""Prometheus metrics of the scale-in guard."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from inferq.consumers.scale_in.costs import PodFacts, PodState, Statement, state_of
from inferq.schemas.metrics import BoundedLabel

PatchOutcome = Literal["done", "gone", "conflict", "refused", "failed"]
RestartReason = Literal["ended", "expired", "failed"]

_NAMED = 100


class GuardMetrics:
    """The metrics of one guard."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._pods = Gauge(
            "inferq_scale_in_pods",
            "Workers' pods, by state: busy, idle, unknown, starting.",
            ["task_type", "state"],
            registry=self.registry,
        )
        self._bound = BoundedLabel(_NAMED)
        self._types: set[str] = set()
        patches = Counter(
            "inferq_scale_in_patches",
            "Patches of pods, by outcome: done, gone (no such pod), conflict, refused (no right), failed (retried).",
            ["outcome"],
            registry=self.registry,
        )
        self.patches = {outcome: patches.labels(outcome) for outcome in get_args(PatchOutcome)}
        restarts = Counter(
            "inferq_scale_in_watch_restarts",
            "Watches of pods that began anew, by reason: ended (as usual), expired (410), failed.",
            ["reason"],
            registry=self.registry,
        )
        self.restarts = {reason: restarts.labels(reason) for reason in get_args(RestartReason)}
        self.leader = Gauge(
            "inferq_scale_in_leader", "1 while this guard holds the lease, else 0.", registry=self.registry
        )
        self.last_success = Gauge(
            "inferq_scale_in_last_success_timestamp_seconds",
            "When the pods and heartbeats were last known and all costs right (Unix seconds).",
            registry=self.registry,
        )

    def count(self, pods: Iterable[PodFacts], statements: Mapping[str, Statement]) -> None:
        """Set the numbers of pods. A type that has no pods any more stays, with zeros."""
        counts = Counts((self._bound(pod.task_type), state_of(pod, statements.get(pod.name))) for pod in pods)
        self._types |= {task_type for task_type, _ in counts}
        for task_type in self._types:
            for state in get_args(PodState):
                self._pods.labels(task_type, state).set(counts[task_type, state])
