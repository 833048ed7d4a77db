"""Deletion costs: from facts to patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.scale_in.costs import (
    BUSY_COST,
    LEAST_COST,
    TRUSTED_SECONDS,
    UNKNOWN_COST,
    PodFacts,
    Statement,
    busy_cost,
    patches,
    state_of,
)
from inferq.consumers.scale_in.hearing import statements
from inferq.schemas.monitor import WorkerInfo
from tests.scale_in import rules

_INT32 = st.integers(LEAST_COST, -LEAST_COST - 1)
_STATEMENTS = st.none() | st.builds(
    Statement,
    busy=st.booleans(),
    work_seconds=st.floats(0, 90_000),
    priority=st.integers(-(2**30), 0),
    age=st.floats(0, 20),
)


@st.composite
def _clusters(draw: st.DrawFn) -> tuple[list[PodFacts], dict[str, Statement]]:
    """Pods of two ReplicaSets, with costs that are as they may be, and what their workers said."""
    pods, said = [], {}
    for number in range(draw(st.integers(0, 8))):
        name = f"pod-{number}"
        pods.append(
            PodFacts(
                name=name,
                uid=f"uid-{number}",
                owner=draw(st.sampled_from(["rs-1", "rs-2"])),
                task_type="echo",
                ready=draw(st.booleans()),
                cost=draw(st.none() | st.integers(-5, 130) | _INT32),
            )
        )
        if (statement := draw(_STATEMENTS)) is not None:
            said[name] = statement
    return pods, said


def patched(pods: Iterable[PodFacts], said: Mapping[str, Statement]) -> list[PodFacts]:
    """The pods after the patches."""
    pods = list(pods)
    costs = {patch.pod.uid: patch.cost for patch in patches(pods, said)}
    return [replace(pod, cost=costs.get(pod.uid, pod.cost)) for pod in pods]


@given(_clusters())
def test_a_busy_pod_is_never_chosen_while_an_idle_one_exists(
    cluster: tuple[list[PodFacts], dict[str, Statement]],
) -> None:
    pods, said = cluster
    after = patched(pods, said)
    for owner in ("rs-1", "rs-2"):
        ready = [pod for pod in after if pod.owner == owner and pod.ready]
        order = rules.removal_order(
            [rules.Pod(pod.name, pod.uid, "n", cost=pod.cost or 0, ready_at=1.0) for pod in ready], now=9.0
        )
        by_name = {pod.name: state_of(pod, said.get(pod.name)) for pod in ready}
        states = [by_name[pod.name] for pod in order]
        rank = {"idle": 0, "unknown": 1, "busy": 2}
        if "idle" in states:
            idle_and_others = [rank[state] > 0 for state in states]
            assert idle_and_others == sorted(idle_and_others), "every idle pod goes first"
            busy_or_not = [
                state == "busy" for pod, state in zip(order, states, strict=True)
                # A worker that was busy and is silent since keeps its cost.
                if not (state == "unknown" and pod.cost >= BUSY_COST)
            ]  # fmt: skip
            assert busy_or_not == sorted(busy_or_not), "what is unknown goes before what is busy"


@given(_clusters())
def test_a_second_look_finds_nothing_to_do(cluster: tuple[list[PodFacts], dict[str, Statement]]) -> None:
    pods, said = cluster
    assert patches(patched(pods, said), said) == []


@given(_clusters())
def test_ignorance_never_lowers_a_cost(cluster: tuple[list[PodFacts], dict[str, Statement]]) -> None:
    pods, said = cluster
    for patch in patches(pods, said):
        assert LEAST_COST <= patch.cost <= -LEAST_COST - 1
        if state_of(patch.pod, said.get(patch.pod.name)) in ("unknown", "starting"):
            assert patch.cost > (patch.pod.cost or 0)


@given(_clusters())
def test_protection_comes_first(cluster: tuple[list[PodFacts], dict[str, Statement]]) -> None:
    costs = [patch.cost for patch in patches(*cluster)]
    assert costs == sorted(costs, reverse=True)


@given(st.floats(0, 90_000), st.floats(0, 90_000))
def test_the_longer_a_run_the_higher_the_cost_in_few_steps(one: float, other: float) -> None:
    shorter, longer = sorted((one, other))
    assert BUSY_COST <= busy_cost(shorter) <= busy_cost(longer) <= BUSY_COST + 13


def test_the_steps_of_a_run_double() -> None:
    assert [busy_cost(s) - BUSY_COST for s in (0, 14, 15, 29, 30, 60, 120, 3600)] == [0, 0, 1, 1, 2, 3, 4, 8]


def pod(name: str, *, ready: bool = True, cost: int | None = None, owner: str = "rs") -> PodFacts:
    return PodFacts(name, f"uid-{name}", owner, "echo", ready, cost)


def made(pods: Iterable[PodFacts], **said: Statement) -> dict[str, int]:
    """The costs that are written, by the pod's name."""
    return {patch.pod.name: patch.cost for patch in patches(pods, said)}


BUSY, IDLE = Statement(True, 40), Statement(False)


def test_it_writes_only_what_matters() -> None:
    assert made([pod("a"), pod("b")], a=BUSY, b=IDLE) == {"a": 102}, "b counts as 0 already"
    assert made([pod("a")], a=BUSY) == {}, "one pod leaves no choice"
    assert made([pod("a"), pod("b", owner="other")], a=BUSY, b=IDLE) == {}
    assert made([pod("a"), pod("b")], a=IDLE, b=IDLE) == {}
    assert made([pod("a", cost=102), pod("b")], a=IDLE, b=IDLE) == {"a": 0}
    assert made([pod("a", cost=100), pod("b")], a=BUSY, b=BUSY) == {"b": 102}, "a's step does not matter now"
    assert made([pod("a", cost=100), pod("b", cost=104), pod("c")], a=BUSY, b=BUSY, c=IDLE) == {
        "a": 102, "b": 102,
    }  # fmt: skip


def test_an_idle_worker_that_gets_its_tasks_later_is_removed_earlier() -> None:
    said = {"old": Statement(False, priority=-10), "young": Statement(False, priority=-700)}
    assert made([pod("old"), pod("young")], **said) == {"old": -10, "young": -700}


def test_what_is_not_known_counts_as_busy_rather_than_idle() -> None:
    silent = Statement(False, age=TRUSTED_SECONDS + 1)
    assert made([pod("a"), pod("b")], a=silent, b=IDLE) == {"a": UNKNOWN_COST}
    assert made([pod("a"), pod("b")], b=IDLE) == {"a": UNKNOWN_COST}, "ready, and never heard of"
    assert made([pod("a", ready=False), pod("b")], b=IDLE) == {}, "it starts"
    assert made([pod("a", cost=103), pod("b")], b=IDLE) == {}, "it was busy when it was heard of last"
    assert made([pod("a", cost=103), pod("b", cost=0), pod("c")]) == {}, "nothing is known at all"
    late = Statement(True, 40, age=TRUSTED_SECONDS + 9)
    assert made([pod("a"), pod("b")], a=late, b=IDLE) == {"a": 102}


NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


def worker(name: str = "pod", **fields: Any) -> WorkerInfo:
    about = {
        "worker_id": "w", "name": name, "host": "h", "pid": 1, "task_type": "echo", "lanes": ("normal",),
        "state": "idle", "slots": 1, "busy": 0, "version": "0", "since": NOW - timedelta(hours=1),
        "seen_seconds_ago": 2.0,
    }  # fmt: skip
    return WorkerInfo.model_validate({**about, **fields})


def task(seconds: float) -> dict[str, Any]:
    return {"tenant": "t", "task_id": "i", "priority": "normal", "since": NOW - timedelta(seconds=seconds)}


def test_what_a_worker_says() -> None:
    def heard(**fields: Any) -> Statement:
        return statements([worker(**fields)], NOW)["pod"]

    assert heard(consumer_priority=-7) == Statement(False, 0, -7, 2.0)
    assert heard(state="loading") == Statement(False, age=2.0)
    assert heard(state="busy", busy=1, in_hand={"normal": 1}, tasks=[task(60)]) == Statement(
        True, 60, age=2.0
    )
    # It waits for S3 with a result in hand.
    assert heard(state="paused", busy=1, tasks=[task(9)]).busy
    # It waits for Redis with nothing in hand.
    assert not heard(state="paused").busy
    # Its message is not read yet, or its clock is ahead.
    assert heard(state="busy", busy=1) == Statement(True, 0, age=2.0)
    assert heard(busy=1, tasks=[task(-5)]) == Statement(True, 0, age=2.0)
    # Several slots: what all of them would lose.
    assert heard(slots=3, busy=2, tasks=[task(10), task(20)]).work_seconds == 30


def test_a_worker_for_several_types_is_busy_while_one_of_them_is() -> None:
    ocr = worker(task_type="ocr", busy=1, tasks=[task(10)])
    ner = worker(task_type="ner", worker_id="another")
    assert (
        statements([ocr, ner], NOW)["pod"]
        == statements([ner, ocr], NOW)["pod"]
        == Statement(True, 10, age=2.0)
    )


def test_of_a_container_that_restarted_only_the_new_process_counts() -> None:
    old, new = worker(busy=1, state="busy"), worker(since=NOW)
    assert not statements([old, new], NOW)["pod"].busy
    assert not statements([new, old], NOW)["pod"].busy
