"""The short form of `make scale-in`, and the rules by which it removes pods."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import RabbitMQ
from tests.scale_in.cluster import forks
from tests.scale_in.rules import Pod, Scaler, Timing, removal_order
from tests.scale_in.run import play


def test_with_the_guard_no_busy_worker_is_removed_while_another_one_is_idle(
    shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    row = play(
        "guard and order",
        1,
        scale_ins=2,
        rabbitmq=shared_rabbitmq,
        redis_url=redis_url.removesuffix("/0") + "/8",
        folder=folder,
        start=forks(folder),
    )
    assert row.scale_ins >= 2
    assert row.avoidable == 0, row.notes
    assert row.patches > 0
    assert row.results == row.tasks > 0


def test_a_replica_set_removes_pods_in_its_published_order() -> None:
    pods = [
        Pod("unassigned", "9", node="", phase="Pending", cost=9),
        Pod("pending", "8", node="n", phase="Pending", cost=9),
        Pod("not ready", "7", node="n", cost=9),
        Pod("idle and old", "6", node="n", ready_at=1.0, cost=-7),
        Pod("crowded", "5", node="n", ready_at=1.0),
        Pod("young", "4", node="m", ready_at=99.0),
        Pod("old, first uid", "2", node="k", ready_at=1.0),
        Pod("as old, later uid", "3", node="l", ready_at=2.0),
        Pod("busy", "1", node="o", ready_at=1.0, cost=100),
    ]
    assert removal_order(pods[::-1], now=100.0) == pods


def test_the_hpa_scales_down_to_the_most_that_was_wanted_lately_and_keda_to_zero() -> None:
    timing = Timing(poll=5, cooldown=60, sync=15, stabilization=30)
    scaler = Scaler(timing, most=8)
    assert scaler.look(0, 0) == 0
    assert scaler.look(5, 3) == 1, "KEDA"
    assert scaler.look(20, 20) == 5, "the HPA: four more at most, or twice as many"
    assert scaler.look(35, 20) == 8
    assert scaler.look(50, 2) == 8, "a while ago it wanted more"
    assert scaler.look(65, 3) == 8
    assert scaler.look(80, 2) == 3
    assert scaler.look(95, 0) == 3
    assert scaler.look(125, 0) == 1
    assert scaler.look(140, 0) == 1, "the HPA never goes to zero"
    assert scaler.look(145, 0) == 0, "the last message was seen 65 s ago"
