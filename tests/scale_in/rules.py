"""Which pods Kubernetes wants and removes, by published rules.

ReplicaSet: `ActivePodsWithRanks` in pkg/controller/controller_utils.go, and
https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#scaling-a-replicaset. HPA: autoscaling/v2, an
external metric with an average value, https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/.
KEDA: https://keda.sh/docs/latest/concepts/scaling-deployments/.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key

_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


@dataclass(frozen=True)
class Pod:
    """What a ReplicaSet compares. Times are in seconds; `ready_at` is None for a pod that is not ready."""

    name: str
    uid: str
    node: str = ""
    phase: str = "Running"
    ready_at: float | None = None
    cost: int = 0
    restarts: int = 0
    created_at: float = 0.0


def removal_order(pods: Sequence[Pod], now: float) -> list[Pod]:
    """The pods of a ReplicaSet, the first to be removed first."""
    on_node = Counter(pod.node for pod in pods)

    def compare(a: Pod, b: Pod) -> int:
        if a.node != b.node and not (a.node and b.node):
            return -1 if not a.node else 1
        pairs = [
            (_PHASES[a.phase], _PHASES[b.phase]),
            (a.ready_at is not None, b.ready_at is not None),
            (a.cost, b.cost),
            (-on_node[a.node], -on_node[b.node]),
        ]
        for one, other in pairs:
            if one != other:
                return -1 if one < other else 1
        if a.ready_at is not None and b.ready_at is not None and a.ready_at != b.ready_at:
            return _by_age(a.ready_at, b.ready_at, a, b, now)
        if a.restarts != b.restarts:
            return -1 if a.restarts > b.restarts else 1
        if a.created_at != b.created_at:
            return _by_age(a.created_at, b.created_at, a, b, now)
        return 0

    return sorted(pods, key=cmp_to_key(compare))


def _by_age(a_at: float, b_at: float, a: Pod, b: Pod, now: float) -> int:
    """Younger first, by the logarithm of the age in nanoseconds; the same logarithm: by uid."""
    difference = _logarithm(now - a_at) - _logarithm(now - b_at)
    if difference == 0:
        return -1 if a.uid < b.uid else 1
    return -1 if difference < 0 else 1


def _logarithm(seconds: float) -> int:
    return int(math.log2(seconds * 1e9)) if seconds > 0 else -1


@dataclass(frozen=True)
class Timing:
    """The times of KEDA and the HPA in seconds; the defaults are those of k8s/components/keda, but for the cooldown."""

    poll: float = 5.0
    cooldown: float = 60.0
    sync: float = 15.0
    stabilization: float = 60.0


class Scaler:
    """KEDA's and the HPA's decision, from the number of messages: one task per worker is wanted."""

    def __init__(self, timing: Timing, most: int) -> None:
        self._timing = timing
        self._most = most
        self._next_poll = self._next_sync = float("-inf")
        self._active_at = float("-inf")
        self._wanted: deque[tuple[float, int]] = deque()
        self.replicas = 0

    def due(self, now: float) -> bool:
        """Whether it would look at the metric now."""
        return now >= self._next_poll or (self.replicas > 0 and now >= self._next_sync)

    def look(self, now: float, messages: int) -> int:
        """The replicas that are wanted from now on."""
        timing = self._timing
        if now >= self._next_poll:
            self._next_poll = now + timing.poll
            if messages:
                self._active_at = now
                if not self.replicas:
                    self.replicas, self._next_sync = 1, now + timing.sync
                    self._wanted.clear()
            elif self.replicas and now - self._active_at > timing.cooldown:
                self.replicas = 0
        if self.replicas and now >= self._next_sync:
            self._next_sync = now + timing.sync
            self.replicas = self._sync(now, messages)
        return self.replicas

    def _sync(self, now: float, messages: int) -> int:
        current = self.replicas
        proposed = current if abs(messages / current - 1) <= 0.1 else max(1, messages)
        self._wanted.append((now, proposed))
        while self._wanted[0][0] < now - self._timing.stabilization:
            self._wanted.popleft()
        if proposed < current:
            proposed = min(current, max(wanted for _, wanted in self._wanted))
        else:
            proposed = min(proposed, max(current + 4, 2 * current))
        return min(proposed, self._most)
