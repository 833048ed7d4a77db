"""What manifests name exists: settings, images, commands, metrics, Secrets, users with their rights, trigger keys."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from inferq.producer.cli import app
from inferq.producer.cli.settings import _models, variables
from inferq.schemas import Settings
from tests.k8s.manifests import (
    K8S,
    ROOT,
    TYPES,
    Manifest,
    components,
    kubectl,
    of_kind,
    overlays,
    render,
    targets,
)
from tests.k8s.test_pods import image_of, pods
from tests.monitoring.exported import OF_OTHERS, declared
from tests.rights.page import read_page

PAGES = [K8S / "README.md", ROOT / "docs" / "deploy" / "kubernetes.md"]
SCRIPT = K8S / "e2e.sh"
FILES = [path for path in K8S.rglob("*") if path.suffix in {".yaml", ".sh", ".toml", ".conf"}]

TRIGGER_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "cron": ({"timezone", "start", "end", "desiredReplicas"}, set()),
    "metrics-api": (
        {"url", "valueLocation", "targetValue"},
        {"activationTargetValue", "authMode", "format", "method", "timeout", "unsafeSsl"},
    ),
    "prometheus": (
        {"serverAddress", "query", "threshold"},
        {"activationThreshold", "authModes", "ignoreNullValues", "namespace", "timeout", "unsafeSsl"},
    ),
    "rabbitmq": (
        {"protocol", "queueName", "mode", "value"},
        {
            "activationValue", "excludeUnacknowledged", "host", "hostFromEnv", "operation", "pageSize", "timeout",
            "unsafeSsl", "useRegex", "vhostName",
        },
    ),
}  # fmt: skip
"""Of each type of trigger that we use: the keys of `metadata` that it must have, and those that it may have. KEDA takes
any key, and says nothing of one that it does not know."""


def texts(value: Any) -> Iterator[str]:
    """All strings in a manifest, keys included."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)
    elif isinstance(value, str):
        yield value


# Settings.


def test_every_setting_that_is_named_exists() -> None:
    known = {each.name for each in variables(plugins=False)}
    named: dict[str, set[str]] = {}
    for path in [*FILES, *(page for page in PAGES if page.exists())]:
        for name in re.findall(r"\bINFERQ_[A-Z0-9_]+", path.read_text("utf-8")):
            named.setdefault(name, set()).add(path.name)
    assert {"INFERQ_GRACE_SECONDS", "INFERQ_TRUSTED_PROXIES", "INFERQ_AMQP_URL"} <= named.keys()
    assert {name: sorted(files) for name, files in named.items() if name not in known} == {}


def environment(manifests: tuple[Manifest, ...], container: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a container with plain values: those of its ConfigMaps, and its own."""
    config_maps = of_kind(manifests, "ConfigMap")
    found: dict[str, str] = {}
    for each in container.get("envFrom", []):
        if "configMapRef" in each:
            found |= config_maps[each["configMapRef"]["name"]]["data"]
    return found | {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


@pytest.mark.parametrize("path", overlays())
def test_every_value_of_a_setting_is_accepted(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(plugins=False)  # loads all settings
    for name in [name for name in os.environ if name.startswith("INFERQ_")]:
        monkeypatch.delenv(name)
    for pod in pods():
        if pod.target != path or not pod.component:
            continue
        with monkeypatch.context() as patch:
            for container in pod.containers:
                for name, value in environment(render(path), container).items():
                    if name.startswith("INFERQ_"):
                        patch.setenv(name, value)
            for model in set(_models(Settings)):
                if model.__module__.startswith("inferq."):
                    model.load()


# Images and commands.


def test_every_pod_of_ours_starts_a_command_that_exists() -> None:
    for pod in pods():
        if not pod.component:
            continue
        container = pod.spec["containers"][0]
        image = image_of(pod)
        command = container.get("command") or [*image.entry_point]
        arguments = container.get("args", () if "command" in container else image.arguments)
        line = [*command, *arguments]
        if line[0] == "inferq":
            parse(line[1:], pod.name)
        else:
            assert line[0] == "python", pod.name


def parse(line: list[str], what: str) -> None:
    """Parse a command line as the program does, without running it. Raises UsageError."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command)
    while hasattr(command, "get_command"):
        name, *line = line
        command = command.get_command(context, name)
        assert command is not None, f"{what}: no command {name}"
    command.make_context(what, list(line))


def test_a_worker_starts_the_type_that_it_is_labelled_with() -> None:
    for pod in pods():
        if pod.component == "worker":
            assert image_of(pod).entry_point == ("inferq", "worker", pod.labels["inferq.dev/type"]), pod.name


def test_an_overlay_names_every_image_with_a_tag() -> None:
    for pod in pods():
        if pod.target.startswith("overlays/"):
            for container in pod.containers:
                assert re.search(r":[\w.-]+$", container["image"]), f"{pod.name}: {container['image']}"
                assert not container["image"].endswith(":latest"), pod.name


def test_services_beside_inferq_have_the_version_that_compose_starts() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
    started = {each["image"] for each in compose["services"].values()}
    used = {
        pod.spec["containers"][0]["image"]
        for pod in pods()
        if pod.target == "overlays/try" and not pod.component
    }
    names = {image.partition(":")[0] for image in started}
    assert {"rabbitmq", "chrislusf/seaweedfs"} <= names
    assert {image for image in used if image.partition(":")[0] in names} <= started


# Metrics.


def test_every_metric_that_is_named_exists() -> None:
    known = declared().keys() | OF_OTHERS
    named = set()
    for target in targets():
        for manifest in render(target):
            for text in texts(manifest):
                named |= set(re.findall(r"\binferq_[a-z_]+\b", text))
    assert {"inferq_queue_messages", "inferq_http_requests_total"} <= named
    plain = {re.sub(r"_(bucket|count|sum)$", "", name) for name in named} - {
        "inferq_dev_type",
        "inferq_dev_track",
    }
    assert plain - known == set()


# Secrets.


def wanted_secrets(manifests: tuple[Manifest, ...], path: str) -> set[tuple[str, str | None]]:
    """The Secrets that resources refer to, with the key where they name one."""
    found: set[tuple[str, str | None]] = set()
    for pod in pods():
        if pod.target != path:
            continue
        for container in pod.containers:
            found |= {
                (each["secretRef"]["name"], None)
                for each in container.get("envFrom", [])
                if "secretRef" in each
            }
            for each in container.get("env", []):
                if ref := each.get("valueFrom", {}).get("secretKeyRef"):
                    found.add((ref["name"], ref["key"]))
        for volume in pod.spec.get("volumes", []):
            if secret := volume.get("secret"):
                found |= {(secret["secretName"], each["key"]) for each in secret.get("items", [])}
                found.add((secret["secretName"], None))
    for each in of_kind(manifests, "TriggerAuthentication").values():
        found |= {(ref["name"], ref["key"]) for ref in each["spec"].get("secretTargetRef", [])}
    for each in of_kind(manifests, "RabbitmqCluster").values():
        found.add((each["spec"]["tls"]["secretName"], None))
    return found


def made_secrets(manifests: tuple[Manifest, ...]) -> dict[str, set[str] | None]:
    """The Secrets that operators make, with their keys; None where a store of secrets decides which."""
    found: dict[str, set[str] | None] = {}
    for each in of_kind(manifests, "ExternalSecret").values():
        spec = each["spec"]
        found[spec["target"]["name"]] = {ref["secretKey"] for ref in spec["data"]} if "data" in spec else None
    for each in of_kind(manifests, "Certificate").values():
        found[each["spec"]["secretName"]] = {"ca.crt", "tls.crt", "tls.key"}
    for name in of_kind(manifests, "User"):
        found[f"{name}-user-credentials"] = {"username", "password"}
    return found


def missing_secrets(
    wanted: set[tuple[str, str | None]], made: Mapping[str, set[str] | None]
) -> set[tuple[str, str | None]]:
    return {
        (name, key)
        for name, key in wanted
        if name not in made or (key is not None and (keys := made[name]) is not None and key not in keys)
    }


def test_in_production_every_secret_is_made_by_an_operator() -> None:
    manifests = render("overlays/production")
    wanted = wanted_secrets(manifests, "overlays/production")
    assert {"inferq-worker", "inferq-gateway", "inferq-api-keys"} <= {name for name, _ in wanted}
    assert missing_secrets(wanted, made_secrets(manifests)) == set()


def test_the_script_of_the_overlay_try_makes_its_secrets(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "kubectl").symlink_to(kubectl())
    (programs / "inferq").symlink_to(Path(os.sys.executable).parent / "inferq")  # type: ignore[attr-defined]
    done = subprocess.run(
        [K8S / "overlays" / "try" / "secrets.sh"],
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^INFERQ_API_KEY=iq_[\w-]+$", done.stderr, re.MULTILINE)
    made = {each["metadata"]["name"]: each for each in yaml.safe_load_all(done.stdout)}
    assert {each["metadata"]["namespace"] for each in made.values()} == {"inferq"}
    wanted = wanted_secrets(render("overlays/try"), "overlays/try")
    assert missing_secrets(wanted, {name: set(each["data"]) for name, each in made.items()}) == set()
    assert made.keys() == {name for name, _ in wanted}
    named = {key for each in made.values() for key in each["data"] if key.startswith("INFERQ_")}
    assert named <= {each.name for each in variables(plugins=False)}


# Rights.


@cache
def rabbitmq() -> tuple[Manifest, ...]:
    return render("components/rabbitmq")


def test_users_of_rabbitmq_have_the_rights_of_the_page_and_no_others() -> None:
    page = read_page(task_type=f"({'|'.join(TYPES)})")
    given = {}
    for name, permission in of_kind(rabbitmq(), "Permission").items():
        spec = permission["spec"]
        assert spec["userReference"] == {"name": name}
        rights = spec["permissions"]
        given[name.removeprefix("inferq-")] = (rights["configure"], rights["write"], rights["read"])
    assert given.pop("keda") == ("^$", "^$", "^$")
    assert given == {user: page[user].permissions for user in given}
    assert (
        given.keys() == {pod.component for pod in pods() if pod.target == "components/rabbitmq"} & page.keys()
    )
    assert of_kind(rabbitmq(), "User").keys() == of_kind(rabbitmq(), "Permission").keys()
    tags = {name: user["spec"].get("tags", []) for name, user in of_kind(rabbitmq(), "User").items()}
    assert {name: each for name, each in tags.items() if each} == {"inferq-keda": ["management"]}


def test_a_part_connects_as_its_own_user() -> None:
    for pod in pods():
        if pod.target == "components/rabbitmq":
            container = pod.spec["containers"][0]
            users = {
                each["valueFrom"]["secretKeyRef"]["name"]
                for each in container["env"]
                if "secretKeyRef" in each.get("valueFrom", {})
            }
            assert users == {f"inferq-{pod.component}-user-credentials"}, pod.name
            order = [each["name"] for each in container["env"]]
            assert order.index("INFERQ_AMQP_URL") > order.index("RABBITMQ_PASSWORD"), (
                "not expanded before it is known"
            )


# Triggers of KEDA.


def trigger_faults(trigger: Mapping[str, Any]) -> list[str]:
    """What is wrong with the metadata of a trigger."""
    kind, metadata = trigger["type"], trigger["metadata"]
    if kind not in TRIGGER_KEYS:
        return [f"no keys are known of triggers of type {kind}"]
    needed, allowed = TRIGGER_KEYS[kind]
    faults = [f"unknown key {key}" for key in metadata.keys() - needed - allowed]
    faults += [f"missing key {key}" for key in needed - metadata.keys()]
    return faults + [f"{key} is not a text" for key, value in metadata.items() if not isinstance(value, str)]


def test_triggers_have_the_keys_that_keda_reads() -> None:
    for target in targets():
        for kind in ("ScaledObject", "ScaledJob"):
            for name, scaled in of_kind(render(target), kind).items():
                for trigger in scaled["spec"]["triggers"]:
                    assert trigger_faults(trigger) == [], f"{target}: {name}"


def test_a_key_that_keda_does_not_read_is_found() -> None:
    right = {"protocol": "http", "queueName": "q", "mode": "QueueLength", "value": "1"}
    assert trigger_faults({"type": "rabbitmq", "metadata": right}) == []
    wrong = {**right, "useRegexp": "true", "value": 1}
    assert trigger_faults({"type": "rabbitmq", "metadata": wrong}) == [
        "unknown key useRegexp",
        "value is not a text",
    ]
    del right["mode"]
    assert trigger_faults({"type": "rabbitmq", "metadata": right}) == ["missing key mode"]


# The page and the script.


def test_the_page_names_every_component() -> None:
    page = PAGES[1].read_text("utf-8")
    assert [path for path in components() if f"`{Path(path).name}`" not in page] == []


def test_the_page_and_the_script_name_what_the_overlay_try_has() -> None:
    manifests = render("overlays/try")
    known = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in manifests}
    for path in (*PAGES, SCRIPT):
        text = path.read_text("utf-8")
        named = set(re.findall(r"\b(?:deployment|service|job)/[a-z]+(?:-[a-z]+)?\b", text))
        assert named <= known, path
        for folder in re.findall(r"k8s/[\w./-]+", text):
            assert (ROOT / folder.rstrip(".")).exists(), f"{path}: {folder}"
    loaded = {each.removesuffix(":try") for pod in pods() if pod.target == "overlays/try"
              for each in (pod.spec["containers"][0]["image"],) if each.startswith("inferq-")}  # fmt: skip
    for path in (PAGES[1], SCRIPT):
        names = re.search(r"(?:for image in|images=\()([a-z ]+)", path.read_text("utf-8"))
        assert names is not None
        assert {f"inferq-{name}" for name in names[1].split()} == loaded, path
