"""Every overlay, worker and component renders."""

from __future__ import annotations

import pytest

from inferq.schemas import installed_types
from tests.k8s.manifests import TYPES, components, kustomization, of_kind, overlays, render, targets


@pytest.mark.parametrize("path", targets())
def test_it_renders(path: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in render(path)]
    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", components())
def test_a_component_merges_no_settings(path: str) -> None:
    """Components run after the generators of their overlay, which could not set these settings any more."""
    generators = kustomization(path).get("configMapGenerator", [])
    assert [each["name"] for each in generators if each.get("behavior")] == []


def test_every_task_type_of_ours_has_a_worker() -> None:
    own = {name for name, each in installed_types().items() if each.distribution == "inferq"}
    assert set(TYPES) == own


@pytest.mark.parametrize("path", [f"workers/{name}" for name in TYPES])
def test_a_worker_is_named_after_its_type(path: str) -> None:
    name = path.removeprefix("workers/")
    (worker,) = render(path)
    labels = {
        "app.kubernetes.io/name": "inferq",
        "app.kubernetes.io/component": "worker",
        "inferq.dev/type": name,
        "inferq.dev/track": "stable",
    }
    assert worker["metadata"] == {"name": f"worker-{name}", "labels": labels}
    assert worker["spec"]["selector"]["matchLabels"] == labels
    assert worker["spec"]["template"]["metadata"]["labels"] == labels
    assert worker["spec"]["template"]["spec"]["containers"][0]["image"] == f"inferq-{name}"


@pytest.mark.parametrize("path", overlays())
def test_pods_read_the_rendered_config_maps(path: str) -> None:
    """A reference that kustomize does not follow keeps the name without the hash, and its pods never start."""
    manifests = render(path)
    config_maps = of_kind(manifests, "ConfigMap")
    used = set()
    for deployment in of_kind(manifests, "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        for container in pod["containers"]:
            used |= {
                each["configMapRef"]["name"]
                for each in container.get("envFrom", [])
                if "configMapRef" in each
            }
        used |= {each["configMap"]["name"] for each in pod.get("volumes", []) if "configMap" in each}
    for access in of_kind(manifests, "TriggerAuthentication").values():
        used |= {each["name"] for each in access["spec"].get("configMapTargetRef", [])}
    assert used == config_maps.keys()
    assert {name.rpartition("-")[0] for name in used} >= {"inferq", "inferq-schedules"}
