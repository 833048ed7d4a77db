"""The canary of a worker, and the two colours of the gateway."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferq.consumers.worker.settings import WorkerSettings
from inferq.schemas import InstallationError
from tests.k8s.manifests import K8S, Manifest, kustomization, of_kind, render_with

CANARY, BLUE_GREEN = "components/canary", "components/gateway-blue-green"
GREEN = "registry.example.com/inferq-gateway:0.2.0"
SWITCH = (
    """apiVersion: v1
kind: Service
metadata: {name: gateway}
spec: {selector: {inferq.dev/color: green}}
""",
    f"""apiVersion: apps/v1
kind: Deployment
metadata: {{name: gateway-green}}
spec: {{template: {{spec: {{containers: [{{name: gateway, image: "{GREEN}"}}]}}}}}}
""",
)
"""The patches of an overlay that rolls out the gateway of the other colour."""


def deployment(name: str, resource: str, *components: str) -> Manifest:
    return of_kind(render_with(components, [resource]), "Deployment")[name]


@pytest.fixture(scope="module")
def stable() -> Manifest:
    return deployment("worker-ocr", "workers/ocr")


@pytest.fixture(scope="module")
def canary() -> Manifest:
    return deployment("worker-ocr-canary", "workers/ocr", CANARY)


@pytest.fixture(scope="module")
def both_gateways() -> tuple[Manifest, ...]:
    return render_with([BLUE_GREEN], ["base"])


def without_track(manifest: Manifest) -> dict[str, Any]:
    """The pod of a worker, but for its track. Pods of one track are spread over zones."""
    lines = yaml.safe_dump(manifest["spec"]["template"]).splitlines(keepends=True)
    found: dict[str, Any] = yaml.safe_load("".join(line for line in lines if "inferq.dev/track:" not in line))
    return found


def test_a_canary_is_a_worker_of_its_own_with_a_fixed_number_of_pods(
    stable: Manifest, canary: Manifest
) -> None:
    assert "replicas" not in stable["spec"]
    assert canary["spec"]["replicas"] == 1
    for labels in (
        canary["metadata"]["labels"], canary["spec"]["selector"]["matchLabels"],
        canary["spec"]["template"]["metadata"]["labels"],
    ):  # fmt: skip
        assert labels["inferq.dev/track"] == "canary"
        assert labels["inferq.dev/type"] == "ocr"
    assert without_track(canary) == without_track(stable)


def test_each_worker_says_its_pods_track(stable: Manifest, canary: Manifest) -> None:
    for worker in (stable, canary):
        env = {each["name"]: each for each in worker["spec"]["template"]["spec"]["containers"][0]["env"]}
        source = env["INFERQ_TRACK"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert source == "metadata.labels['inferq.dev/track']"
        track = worker["spec"]["template"]["metadata"]["labels"]["inferq.dev/track"]
        assert WorkerSettings(track=track).track == track


def folder(path: Path, resources: list[str], **more: Any) -> str:
    """A kustomization in `path`; `resources` are folders below k8s/, or files in `path`."""
    names = [name if (path / name).exists() else os.path.relpath(K8S / name, path) for name in resources]
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
        **more,
    }
    (path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("track", ["Canary", "a b", "x" * 33, "v1.2"])
def test_a_track_is_a_short_label(track: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_TRACK", track)
    with pytest.raises(InstallationError, match="INFERQ_TRACK"):
        WorkerSettings.load()


def test_nothing_scales_or_protects_a_canary(tmp_path: Path) -> None:
    """What a worker's folder has beside the Deployment is the stable worker's."""
    others = [
        {"apiVersion": version, "kind": kind, "metadata": {"name": "worker-ocr"}, "spec": {}}
        for version, kind in (
            ("keda.sh/v1alpha1", "ScaledObject"), ("keda.sh/v1alpha1", "TriggerAuthentication"),
            ("autoscaling/v2", "HorizontalPodAutoscaler"), ("policy/v1", "PodDisruptionBudget"),
        )
    ]  # fmt: skip
    (tmp_path / "others.yaml").write_text(yaml.safe_dump_all(others))
    stable = folder(tmp_path, ["workers/ocr", "others.yaml"])
    assert len(render_with([], [stable])) == 5
    found = [(each["kind"], each["metadata"]["name"]) for each in render_with([CANARY], [stable])]
    assert found == [("Deployment", "worker-ocr-canary")]


def test_the_canary_of_production_has_its_own_image_beside_the_stable_one(tmp_path: Path) -> None:
    both = ["overlays/production/ocr", "overlays/production/ocr-canary"]
    found = render_with([], [folder(tmp_path, both, images=kustomization("overlays/production")["images"])])
    images = {
        name: worker["spec"]["template"]["spec"]["containers"][0]["image"]
        for name, worker in of_kind(found, "Deployment").items()
    }
    assert images == {
        "worker-ocr": "registry.example.com/inferq-ocr-gpu:0.1.0",
        "worker-ocr-canary": "registry.example.com/inferq-ocr-gpu:0.2.0",
    }


def test_the_gateways_of_both_colours_differ_in_nothing_but_colour_and_image(
    both_gateways: tuple[Manifest, ...],
) -> None:
    (blue, green), _ = gateways(both_gateways)
    gateway = deployment("gateway", "base")
    for color, found in (("blue", blue), ("green", green)):
        assert found["metadata"]["labels"] == {**gateway["metadata"]["labels"], "inferq.dev/color": color}
        labels = found["spec"]["selector"]["matchLabels"]
        assert labels == {**gateway["spec"]["selector"]["matchLabels"], "inferq.dev/color": color}
        assert found["spec"]["template"]["metadata"]["labels"] == labels
        assert found["spec"]["template"]["spec"] == gateway["spec"]["template"]["spec"]
    assert "gateway" not in of_kind(both_gateways, "Deployment")


def test_the_service_sends_requests_to_one_colour_that_an_overlay_can_change(
    both_gateways: tuple[Manifest, ...],
) -> None:
    switched = render_with([BLUE_GREEN], ["base"], SWITCH)
    for found, color, image in ((both_gateways, "blue", "inferq-gateway"), (switched, "green", GREEN)):
        both, service = gateways(found)
        assert service["spec"]["selector"]["inferq.dev/color"] == color
        served = [
            each for each in both
            if service["spec"]["selector"].items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]  # fmt: skip
        assert [each["metadata"]["name"] for each in served] == [f"gateway-{color}"]
        assert served[0]["spec"]["template"]["spec"]["containers"][0]["image"] == image


def gateways(manifests: tuple[Manifest, ...]) -> tuple[tuple[Manifest, Manifest], Manifest]:
    deployments = of_kind(manifests, "Deployment")
    return (deployments["gateway-blue"], deployments["gateway-green"]), of_kind(manifests, "Service")[
        "gateway"
    ]
