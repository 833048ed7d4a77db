"""Deletion costs of workers' pods: pure functions from facts to the patches to make.

Of the pods that are ready, a ReplicaSet removes those with the lowest cost first
(https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#pod-deletion-cost). The costs, from the lowest:

idle     the worker's consumer priority, at most 0: a worker that gets its tasks later is removed earlier
unknown  a pod that is ready and of whose worker nothing certain is known: it may be busy
busy     the higher, the longer its tasks have run, in steps that double

Ignorance never lowers a cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"

UNKNOWN_COST = 10
BUSY_COST = 100
"""The cost of a pod whose tasks have just begun."""
LEAST_COST = -(2**31)

TRUSTED_SECONDS = 8.0
"""How old a heartbeat may be that reports an idle worker. Workers send one every 5 seconds."""
_FIRST_STEP_SECONDS = 15
"""Seconds of work after which the cost of a busy pod rises for the first time."""

PodState = Literal["busy", "idle", "unknown", "starting"]


@dataclass(frozen=True)
class PodFacts:
    """A worker's pod that lives and is not being deleted.

    `owner` is the uid of the ReplicaSet that may remove it. `cost` is None if it has none yet, which counts as 0.
    """

    name: str
    uid: str
    owner: str
    task_type: str
    ready: bool
    cost: int | None


@dataclass(frozen=True)
class Statement:
    """What a worker said last, `age` seconds ago. `work_seconds` is the time that all its tasks have taken so far."""

    busy: bool
    work_seconds: float = 0.0
    priority: int = 0
    age: float = 0.0


@dataclass(frozen=True)
class Patch:
    """A pod, and the cost to give it."""

    pod: PodFacts
    cost: int


def state_of(pod: PodFacts, statement: Statement | None) -> PodState:
    """What is known of a pod. One that is not ready and says nothing is `starting`."""
    if statement is None:
        return "unknown" if pod.ready else "starting"
    if statement.busy:
        return "busy"
    return "idle" if statement.age <= TRUSTED_SECONDS else "unknown"


def busy_cost(work_seconds: float) -> int:
    """The cost of a busy pod: BUSY_COST, and 1 more at 15 s, 30 s, 1 min, 2 min, ….

    The longer a task runs, the more is lost with it, and the more seldom its pod is patched.
    """
    return BUSY_COST + (max(0, int(work_seconds)) // _FIRST_STEP_SECONDS).bit_length()


def idle_cost(priority: int) -> int:
    return max(LEAST_COST, min(0, priority))


def patches(pods: Iterable[PodFacts], statements: Mapping[str, Statement]) -> list[Patch]:
    """The patches to make, the most important first. `statements` are by the names of pods.

    There are none for a ReplicaSet with one pod, which leaves no choice. Between busy pods alone the order of their
    costs does not matter either: scale-in removes idle ones first.
    """
    groups: dict[str, list[PodFacts]] = {}
    for pod in pods:
        groups.setdefault(pod.owner, []).append(pod)
    found = [
        patch
        for group in groups.values()
        if len(group) > 1
        for patch in _patches_of_one(group, statements)
        if patch.cost != (patch.pod.cost or 0)
    ]
    # Protection first, and of the longest run first of all: a round may end early.
    return sorted(found, key=lambda patch: -patch.cost)


def _patches_of_one(group: list[PodFacts], statements: Mapping[str, Statement]) -> Iterator[Patch]:
    """The cost of each pod of a ReplicaSet for which it matters."""
    states = {pod.uid: state_of(pod, statements.get(pod.name)) for pod in group}
    has_idle = "idle" in states.values()
    mixed = has_idle or "unknown" in states.values()
    for pod in group:
        statement, now = statements.get(pod.name), pod.cost or 0
        match states[pod.uid]:
            case "busy" if statement is not None and (mixed or now < BUSY_COST):
                yield Patch(pod, busy_cost(statement.work_seconds))
            case "idle" if statement is not None:
                yield Patch(pod, idle_cost(statement.priority))
            case "unknown" if has_idle:
                yield Patch(pod, max(now, UNKNOWN_COST))
