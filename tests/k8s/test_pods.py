"""What every pod of the manifests has: security, probes, resources, and time to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.consumers.worker.settings import WorkerSettings
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import get_type
from tests.images.dockerfile import Image, images
from tests.k8s.manifests import Manifest, of_kind, overlays, render, targets

WITH_A_TOKEN = {"scale-in-guard"}
"""The components that call the API of Kubernetes."""
_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""The kinds of volumes that the Pod Security level `restricted` allows."""
_PORT = 9000


@dataclass(frozen=True)
class Pod:
    """The template of a workload's pods."""

    target: str
    owner: Manifest

    @property
    def name(self) -> str:
        return f"{self.target}: {self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def template(self) -> dict[str, Any]:
        spec = self.owner["spec"]
        job = spec.get("jobTemplate", {}).get("spec") or spec.get("jobTargetRef") or spec
        template: dict[str, Any] = job["template"]
        return template

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def component(self) -> str:
        """The part of inferq that runs in it; empty for a service beside it."""
        ours = self.labels.get("app.kubernetes.io/name") == "inferq"
        return self.labels.get("app.kubernetes.io/component", "") if ours else ""

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def serves(self) -> bool:
        """Whether it runs until it is stopped."""
        return self.owner["kind"] in {"Deployment", "StatefulSet"}


@cache
def pods() -> tuple[Pod, ...]:
    kinds = {"Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "ScaledJob"}
    return tuple(
        Pod(target, each) for target in targets() for each in render(target) if each["kind"] in kinds
    )


def workers() -> list[Pod]:
    return [pod for pod in pods() if pod.component == "worker"]


def variable(pod: Pod, name: str) -> str | None:
    values = [each.get("value") for each in pod.spec["containers"][0].get("env", []) if each["name"] == name]
    assert len(values) <= 1, f"{pod.name} sets {name} twice"
    return values[0] if values else None


def test_the_pods_are_found() -> None:
    assert {"worker", "gateway", "callbacks", "batches", "beat", "monitor"} <= {
        pod.component for pod in pods()
    }
    assert {pod.owner["kind"] for pod in pods()} >= {"Deployment", "Job"}


# Security.


def faults(pod: Pod) -> Iterator[str]:
    """What the Pod Security level `restricted` refuses, as of Kubernetes 1.37."""
    spec, security = pod.spec, pod.spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", []):
        if kinds := volume.keys() - {"name"} - _VOLUMES:
            yield f"volume {volume['name']}: {', '.join(kinds)}"
    if security.get("sysctls"):
        yield "sysctls"
    for container in pod.containers:
        own = container.get("securityContext", {})
        both = security | own
        name = container["name"]
        if both.get("runAsNonRoot") is not True:
            yield f"{name}: may run as root"
        if own.get("runAsUser") == 0 or security.get("runAsUser") == 0:
            yield f"{name}: runs as root"
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{name}: may gain privileges"
        if both.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            yield f"{name}: has no seccomp profile"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {
            "NET_BIND_SERVICE"
        }:
            yield f"{name}: has capabilities"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name}: takes a port of the node"


def test_all_pods_meet_the_restricted_level_and_the_namespace_insists_on_it() -> None:
    assert {pod.name: found for pod in pods() if (found := list(faults(pod)))} == {}
    for path in overlays():
        (namespace,) = of_kind(render(path), "Namespace").values()
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_a_pod_has_a_read_only_root_and_no_token() -> None:
    for pod in pods():
        for container in pod.containers:
            assert container["securityContext"].get("readOnlyRootFilesystem") is True, pod.name
        if pod.component not in WITH_A_TOKEN:
            assert pod.spec.get("automountServiceAccountToken") is False, pod.name
            assert "serviceAccountName" not in pod.spec, pod.name


def test_no_manifest_holds_a_secret() -> None:
    for target in targets():
        assert not of_kind(render(target), "Secret"), target
    for pod in pods():
        for container in pod.containers:
            for each in container.get("env", []):
                name, value = each["name"], each.get("value", "")
                assert not name.endswith(("PASSWORD", "SECRET", "_KEY")) or "valueFrom" in each, pod.name
                if "://" in value and "@" in value:
                    assert "$(RABBITMQ_PASSWORD)@" in value, f"{pod.name}: {name}"


# Probes, ports and resources.


def test_startup_and_liveness_ask_whether_the_process_answers_and_readiness_whether_it_is_ready() -> None:
    for pod in pods():
        if not pod.component or not pod.serves:
            continue
        (container,) = pod.spec["containers"]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        port = "http" if pod.component == "gateway" else "probes"
        assert ports == ({"http": 8000} if pod.component == "gateway" else {"probes": _PORT}), pod.name
        for probe, path in (("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")):
            assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": port}, pod.name


def test_a_part_has_time_to_start_and_to_answer() -> None:
    for pod in pods():
        if pod.component and pod.serves:
            container = pod.spec["containers"][0]
            startup, liveness = container["startupProbe"], container["livenessProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] >= 120, pod.name
            # A busy machine may answer late; the watchdog of a worker acts within a minute.
            assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 120, pod.name
            assert liveness["timeoutSeconds"] >= 5, pod.name


def test_every_container_has_requests_and_a_limit_of_memory() -> None:
    for pod in pods():
        for container in pod.containers:
            resources = container["resources"]
            assert resources["requests"].keys() >= {"cpu", "memory"}, pod.name
            assert "memory" in resources["limits"], pod.name
            if pod.component:
                assert resources["limits"].keys() >= {"ephemeral-storage"}, pod.name


def image_of(pod: Pod) -> Image:
    """The target of the Dockerfile that a pod of ours runs."""
    name = pod.spec["containers"][0]["image"].rpartition("/")[2].partition(":")[0]
    found = {f"inferq-{image.target}": image for image in images()}
    assert name in found, f"{pod.name}: no target of the Dockerfile makes {name}"
    return found[name]


def test_what_an_image_writes_to_is_a_volume() -> None:
    for pod in pods():
        if pod.component:
            (container,) = pod.spec["containers"]
            mounted = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
            image = image_of(pod)
            written = set(image.values("VOLUME")) or {image.environment["HOME"]}
            assert written <= mounted, f"{pod.name}: {written - mounted}"
            kept = {each["name"] for each in pod.spec["volumes"]}
            assert kept >= {each["name"] for each in container["volumeMounts"]}, pod.name


def test_the_ports_are_those_of_the_images() -> None:
    for pod in pods():
        if pod.component and pod.serves:
            image = image_of(pod)
            (port,) = pod.spec["containers"][0]["ports"]
            assert str(port["containerPort"]) == image.last("EXPOSE"), pod.name


# The end of a pod.


def test_a_worker_may_finish_its_run_before_it_is_killed() -> None:
    """INFERQ_GRACE_SECONDS is the type's time limit and 30 s, the pod's grace period that and 60 s."""
    seen = set()
    for pod in workers():
        grace = float(variable(pod, "INFERQ_GRACE_SECONDS") or WorkerSettings().grace_seconds)
        period = pod.spec["terminationGracePeriodSeconds"]
        if pod.target == "components/spot":
            assert grace < period <= 30, pod.name
            continue
        limit = get_type(pod.labels["inferq.dev/type"]).time_limit
        assert (grace, period) == (limit + 30, limit + 90), pod.name
        seen.add(limit)
    assert len(seen) > 1


def test_the_other_parts_may_finish_what_they_do() -> None:
    callback = CallbackSettings().callback_timeout
    for pod in pods():
        period = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.component == "gateway" and pod.serves:
            sleep = pod.spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert period > sleep + GatewaySettings().shutdown_grace, pod.name
        if pod.component in {"callbacks", "batches"}:
            assert period > callback, pod.name


def test_an_update_starts_no_second_pod_for_a_gpu_in_use() -> None:
    on_gpu = [pod for pod in workers() if any("nvidia.com" in name for name in limits(pod))]
    assert {"components/gpu", "components/gpu-mig", "components/gpu-time-slicing"} <= {
        pod.target for pod in on_gpu
    }
    for pod in on_gpu:
        if pod.serves:
            strategy = pod.owner["spec"]["strategy"]
            assert (strategy["type"], strategy["rollingUpdate"]["maxSurge"]) == ("RollingUpdate", 0), pod.name
        assert len([name for name in limits(pod) if "nvidia.com" in name]) == 1, pod.name
        assert any(each["key"] == "nvidia.com/gpu" for each in pod.spec["tolerations"]), pod.name


def limits(pod: Pod) -> dict[str, str]:
    found: dict[str, str] = pod.spec["containers"][0]["resources"]["limits"]
    return found


# Labels and classes.


def test_selectors_select_their_own_pods_only() -> None:
    for target in targets():
        deployments = [pod for pod in pods() if pod.target == target and pod.owner["kind"] == "Deployment"]
        for pod in deployments:
            selector = pod.owner["spec"]["selector"]["matchLabels"].items()
            matched = [other.name for other in deployments if selector <= other.labels.items()]
            assert matched == [pod.name]
            for spread in pod.spec.get("topologySpreadConstraints", []):
                assert spread["labelSelector"]["matchLabels"].items() <= pod.labels.items(), pod.name


def test_services_and_budgets_select_pods_that_exist() -> None:
    for path in overlays():
        manifests = render(path)
        labels = [pod.labels.items() for pod in pods() if pod.target == path]
        ports = {port["name"] for pod in pods() if pod.target == path
                 for each in pod.containers for port in each.get("ports", [])}  # fmt: skip
        for name, service in of_kind(manifests, "Service").items():
            assert any(service["spec"]["selector"].items() <= each for each in labels), name
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name
        for name, budget in of_kind(manifests, "PodDisruptionBudget").items():
            selector = budget["spec"]["selector"]["matchLabels"]
            by_operator = selector == {"app.kubernetes.io/name": "inferq-rabbitmq"}
            assert by_operator or any(selector.items() <= each for each in labels), name


def test_priority_classes_exist_and_workers_displace_nobody() -> None:
    classes = of_kind(render("base"), "PriorityClass")
    assert {pod.spec["priorityClassName"] for pod in pods() if pod.component and pod.serves} == classes.keys()
    assert classes["inferq-worker"]["preemptionPolicy"] == "Never"
    assert classes["inferq-worker"]["value"] < classes["inferq-service"]["value"]


def test_only_an_autoscaler_sets_the_number_of_workers_and_a_canary_has_a_fixed_one() -> None:
    for pod in workers():
        fixed = pod.template["metadata"]["labels"]["inferq.dev/track"] == "canary"
        assert ("replicas" in pod.owner["spec"]) == fixed, pod.name


def test_a_node_is_not_emptied_under_a_worker() -> None:
    for pod in workers():
        annotations = pod.template["metadata"]["annotations"]
        assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false", pod.name
        assert annotations["karpenter.sh/do-not-disrupt"] == "true", pod.name


@pytest.mark.parametrize("path", overlays())
def test_a_changed_setting_starts_new_pods(path: str) -> None:
    read = set()
    for pod in pods():
        if pod.target == path:
            read |= {each["configMap"]["name"] for each in pod.spec.get("volumes", []) if "configMap" in each}
            for container in pod.containers:
                sources = container.get("envFrom", [])
                read |= {each["configMapRef"]["name"] for each in sources if "configMapRef" in each}
    assert {"inferq", "inferq-schedules"} <= {name.rpartition("-")[0] for name in read}
    for name in read:
        assert len(name.rpartition("-")[2]) == 10, f"{name} has no hash of its content in its name"
