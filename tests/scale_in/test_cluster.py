"""The short form of `make scale-in`, and the rules by which it removes pods."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from inferq.broker import BrokerSettings, Publisher, task_message, topology_for
from inferq.schemas import parse_task
from tests.conftest import RabbitMQ
from tests.scale_in.cluster import Cluster, ScaleIn, forks
from tests.scale_in.kubernetes_api import ApiServer
from tests.scale_in.rules import Pod, Scaler, Timing, removal_order
from tests.scale_in.run import Run, judge
from tests.waiting import eventually


def test_of_three_real_workers_the_busy_one_stays(
    shared_rabbitmq: RabbitMQ, fresh_amqp_url: str, redis_url: str, tmp_path: Path
) -> None:
    env = os.environ | {
        "INFERQ_AMQP_URL": fresh_amqp_url,
        "INFERQ_REDIS_URL": redis_url.removesuffix("/0") + "/8",
        "INFERQ_STORE_URL": (tmp_path / "store").as_uri(),
        "INFERQ_SCRATCH_DIR": str(tmp_path),
        "INFERQ_OLDEST_FIRST": "true",
    }
    publisher = Publisher(
        BrokerSettings(amqp_url=fresh_amqp_url), name="test", topology=topology_for(["echo"])
    )
    publisher.start()
    with ApiServer() as api, closing(publisher):
        vhost = fresh_amqp_url.rpartition("/")[2]
        cluster = Cluster(forks(tmp_path), api, Fixed(3), shared_rabbitmq.management, vhost, env)
        guard = cluster.start_guard(api.write_kubeconfig(tmp_path / "kubeconfig"))

        def stepped(condition: Callable[[], bool]) -> bool:
            cluster.step()
            return condition()

        def states() -> list[str]:
            """What the guard made of each pod."""
            costs = [api.cost(pod.name) for pod in cluster.live]
            return sorted(
                "none" if cost is None else "busy" if int(cost) >= 100 else "idle" for cost in costs
            )

        try:
            eventually(lambda: stepped(lambda: states() == ["idle"] * 3))
            body = {"task_id": "long", "task_type": "echo", "delay": 600}
            publisher.publish(task_message(parse_task(body))).result(30)
            eventually(lambda: stepped(lambda: states() == ["busy", "idle", "idle"]))
            (busy,) = (name for name, taken in cluster.busy(cluster.live).items() if taken)
            cluster.scaler = Fixed(1)
            cluster.step()
            assert [pod.name for pod in cluster.live] == [busy]
            assert len(cluster.scale_ins[-1].removed) == 2
            eventually(lambda: stepped(lambda: len(cluster.pods) == 1), "the end of the idle pods")
        finally:
            cluster.close()
            guard.terminate()
            assert guard.wait(30) == 0


class Fixed(Scaler):
    """As many pods as the test says."""

    def __init__(self, replicas: int) -> None:
        super().__init__(Timing(), replicas)
        self.replicas = replicas

    def due(self, now: float) -> bool:
        return False


def test_a_choice_is_judged_by_what_all_workers_did_at_its_moment() -> None:
    runs = [Run("a", 0, 5), Run("a", 8, 12), Run("b", 0, 9.5), Run("c", 0, 6)]
    choice = ScaleIn(at=10, removed=("a",), stayed=("b",), costs={})
    assert judge(choice, runs)[:3] == (1, 1, 0), "b ended its task half a second ago"
    assert judge(replace(choice, stayed=("b", "c")), runs)[:3] == (1, 1, 1)
    assert judge(replace(choice, removed=("c",), stayed=("a", "b")), runs)[:3] == (0, 0, 0)
    assert judge(replace(choice, removed=("a", "b"), stayed=("never",)), runs)[:3] == (1, 1, 1)


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
