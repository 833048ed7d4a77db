"""What scales the workers: KEDA's resources, Jobs and the autoscaler."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferq.broker import work_queue
from inferq.consumers.monitor.metrics import StatsCollector
from inferq.consumers.worker.settings import WorkerSettings
from inferq.producer.nightly.keda import FORMULA, patch_of
from inferq.schemas import PRIORITIES
from inferq.schemas.monitor import Demand, QueueFigures, Stats, TypeDemand
from inferq.schemas.schedule import Schedule
from tests.k8s.manifests import K8S, Manifest, of_kind, render, render_with
from tests.k8s.test_names import trigger_faults

ACCESS_PARAMETERS = {
    "inferq-rabbitmq": {"host", "vhostName", "tls", "username", "password", "ca"},
    "inferq-gateway": {"token"},
}


def scaled(manifests: tuple[Manifest, ...]) -> Iterator[Manifest]:
    yield from (each for each in manifests if each["kind"] in ("ScaledObject", "ScaledJob"))


def scaled_object(component: str = "components/keda") -> Any:
    return of_kind(render(component), "ScaledObject")["worker-ocr"]["spec"]


def folder_of(path: Path, worker: str, components: list[str], **more: Any) -> str:
    """A type's folder of an overlay, as a user writes it."""
    relative = {each: os.path.relpath(K8S / each, path.resolve()) for each in (worker, *components)}
    around = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [relative[worker]], "components": [relative[each] for each in components], **more,
    }  # fmt: skip
    (path / "kustomization.yaml").write_text(yaml.safe_dump(around))
    return str(path)


def test_access_gives_the_parameters_that_keda_knows() -> None:
    """As the metadata of triggers, a misspelt parameter has no effect and no error."""
    for name, access in of_kind(render("components/keda-access"), "TriggerAuthentication").items():
        sources = [source["parameter"] for values in access["spec"].values() for source in values]
        assert sorted(sources) == sorted(ACCESS_PARAMETERS[name])


def test_every_type_of_the_production_overlay_is_scaled_and_its_access_exists() -> None:
    manifests = render("overlays/production")
    access = of_kind(manifests, "TriggerAuthentication").keys()
    about = {name: each["metadata"]["labels"] for name, each in of_kind(manifests, "Deployment").items()}
    # A canary has a fixed number of workers.
    workers = [name for name, labels in about.items() if labels.get("inferq.dev/track") == "stable"]
    objects = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in scaled(manifests)}
    assert sorted(objects) == sorted(workers)
    for spec in objects.values():
        references = {
            each["authenticationRef"]["name"] for each in spec["triggers"] if "authenticationRef" in each
        }
        assert references
        assert references <= access


@pytest.mark.parametrize("path", ["workers/ocr", "workers/echo", "workers/acestep"])
def test_a_type_is_scaled_by_the_lanes_of_its_own(path: str) -> None:
    name = path.removeprefix("workers/")
    (found,) = scaled(render_with(["components/keda"], [path]))
    assert found["metadata"]["name"] == found["spec"]["scaleTargetRef"]["name"] == f"worker-{name}"
    assert found["metadata"]["labels"]["inferq.dev/type"] == name
    for trigger in found["spec"]["triggers"]:
        queues = re.compile(trigger["metadata"]["queueName"])
        assert all(queues.search(work_queue(name, priority)) for priority in PRIORITIES)
        others = [work_queue(f"{name}2", "high"), work_queue(f"x{name}", "low"), f"inferenceX{name}.high"]
        assert not any(
            map(queues.search, [*others, f"inference.dead.{name}", f"{work_queue(name, 'low')}.x"])
        )


@pytest.mark.parametrize("component", ["keda", "keda-demand", "prescale"])
def test_a_formula_uses_every_trigger_and_no_other_name(component: str) -> None:
    spec = scaled_object(f"components/{component}")
    formula = spec["advanced"]["scalingModifiers"]["formula"]
    names = [trigger["name"] for trigger in spec["triggers"]]
    assert set(re.findall(r"[A-Za-z_]\w*", formula)) - {"max"} == set(names)
    assert not {"all", "any", "count", "max", "min", "none", "one", "sum"} & set(names), (
        "functions of KEDA's formulas"
    )
    assert "fallback" not in spec
    assert spec["minReplicaCount"] == 0


@pytest.mark.parametrize("unacked", range(6))
@pytest.mark.parametrize("ready", [0, 1, 7, 100])
def test_the_formula_wants_no_fewer_workers_than_tasks_in_hand(ready: int, unacked: int) -> None:
    formula = scaled_object()["advanced"]["scalingModifiers"]["formula"]
    wanted = eval(formula, {"max": max, "total": ready + unacked, "waiting": ready})
    assert wanted >= unacked
    assert (wanted > 0) == (ready + unacked > 0)


def test_the_demand_is_read_where_the_gateway_answers_it() -> None:
    (trigger,) = scaled_object("components/keda-demand")["triggers"]
    value: Any = Demand(target_wait=300, types={"ocr": TypeDemand(workers=3)}).model_dump(mode="json")
    for part in trigger["metadata"]["valueLocation"].split("."):
        value = value[part]
    assert value == 3


def test_the_patch_of_nightly_runs_fits_the_component(tmp_path: Path) -> None:
    assert scaled_object()["advanced"]["scalingModifiers"]["formula"] == FORMULA
    night = Schedule(name="scans", cron="30 1 * * *", source="s3://bucket/p/", task_type="ocr")
    patch, left_out = patch_of([night], replicas=3, lead=10, hold=30)
    assert left_out == []
    (tmp_path / "nights.yaml").write_text(patch)
    nights = {"path": "nights.yaml", "target": {"kind": "ScaledObject"}}
    folder = folder_of(tmp_path, "workers/ocr", ["components/keda"], patches=[nights])
    (found,) = scaled(render_with([], [folder]))
    assert [each["name"] for each in found["spec"]["triggers"]] == ["total", "waiting", "night_scans"]
    assert trigger_faults(found["spec"]["triggers"][2]) == []
    assert found["spec"]["advanced"]["scalingModifiers"]["formula"] == f"max({FORMULA}, night_scans)"


def test_a_scaled_job_has_the_pods_that_its_deployment_would_have(tmp_path: Path) -> None:
    """Components that come after it, and the names of ConfigMaps, count for its pods as for those of a Deployment."""
    others = ["components/rabbitmq", "components/weights-pvc"]
    folder = folder_of(tmp_path, "workers/acestep", ["components/gpu", "components/scaled-job"])
    manifests = render_with([*others, "components/scaled-job-convert"], ["base", folder])
    assert "worker-acestep" not in of_kind(manifests, "Deployment")
    job = of_kind(manifests, "ScaledJob")["worker-acestep"]
    assert "annotations" not in job["metadata"] or not job["metadata"]["annotations"]
    folder = folder_of(tmp_path, "workers/acestep", ["components/gpu"])
    plain = of_kind(render_with(others, ["base", folder]), "Deployment")["worker-acestep"]["spec"]["template"]
    pods = job["spec"]["jobTargetRef"]["template"]
    assert pods["spec"].pop("restartPolicy") == "Never"
    environment = pods["spec"]["containers"][0]["env"]
    exit_idle = [each for each in environment if each["name"] == "INFERQ_EXIT_IDLE"]
    assert "exit_idle" in WorkerSettings.model_fields
    assert [float(each["value"]) > 0 for each in exit_idle] == [True]
    environment.remove(exit_idle[0])
    names = [each["name"] for each in plain["spec"]["containers"][0]["env"]]
    environment.sort(key=lambda each: names.index(each["name"]))
    assert pods == plain
    assert plain["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"] in of_kind(
        manifests, "ConfigMap"
    )
    (trigger,) = job["spec"]["triggers"]
    assert "acestep" in trigger["metadata"]["queueName"]
    assert "excludeUnacknowledged" not in trigger["metadata"], "the strategy subtracts the Jobs that run"
    assert job["spec"]["rollout"] == {"strategy": "gradual"}, "a change must not end Jobs that run"


def test_the_autoscaler_reads_a_metric_of_the_monitor_by_its_labels() -> None:
    lanes = (QueueFigures(task_type="ocr", priority="low", ready=1, unacked=2),)
    collector = StatsCollector(lambda: Stats(at=datetime.now(UTC), queues=lanes), lambda: None)
    exported = {sample.name: sample.labels for family in collector.collect() for sample in family.samples}
    spec = of_kind(render("components/hpa"), "HorizontalPodAutoscaler")["worker-ocr"]["spec"]
    assert spec["scaleTargetRef"]["name"] == "worker-ocr"
    (rule,) = yaml.safe_load((K8S / "components/hpa/adapter-rules.yaml").read_text())["rules"]["external"]
    series, _, labels = rule["seriesQuery"].partition("{")
    for metric in (each["external"]["metric"] for each in spec["metrics"]):
        assert metric["name"] == rule["name"]["as"] == series
        wanted = metric["selector"]["matchLabels"]
        assert wanted["task_type"] == "ocr"
        assert wanted.keys() <= exported[series].keys()
    assert spec["metrics"][1]["external"]["metric"]["selector"]["matchLabels"]["state"] == "unacked"
    assert set(re.findall(r"(\w+)!=", labels)) - {"namespace"} <= exported[series].keys()
    assert set(re.findall(r"\w+", rule["metricsQuery"])) >= exported[series].keys()
