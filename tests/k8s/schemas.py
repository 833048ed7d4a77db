"""Checks manifests against schemas, and refuses fields that these do not know: `python schemas.py FOLDER`.

It runs in an environment of its own, `.venv-k8s`, and imports nothing of this project. Resources of Kubernetes are
checked against every version from 1.30 on that kubernetes-validate has, those of KEDA, Prometheus Operator and
cert-manager against models made from their CRDs. For RabbitMQ and External Secrets there is no such package: the
fields that we use stand below, from the operators' API references. A resource without a schema is a fault.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate import utils

FIRST = (1, 30)
MODELS = {
    "cert-manager.io/v1": "cloudcoil.models.cert_manager.v1",
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}
BUILT_IN = re.compile(r"(v1|(apps|autoscaling|batch|policy)/\S+|[a-z.]+\.k8s\.io/\S+)$")

_TEXT: dict[str, Any] = {"type": "string"}


def _object(required: tuple[str, ...] = (), /, **fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


_NAME = _object(("name",), name=_TEXT)
_LABELS = {"type": "object", "additionalProperties": _TEXT}
_RESOURCES = {"type": "object", "propertyNames": {"enum": ["cpu", "memory"]}, "additionalProperties": _TEXT}
_STORE = _object(("name",), kind={"enum": ["SecretStore", "ClusterSecretStore"]}, name=_TEXT)
_REMOTE = _object(("key",), key=_TEXT, property=_TEXT)
_ANTI_AFFINITY = _object(
    ("topologyKey",), topologyKey=_TEXT, labelSelector=_object(("matchLabels",), matchLabels=_LABELS)
)
_CONTAINERS = {
    "type": "array",
    "items": _object(
        ("name",),
        name={"enum": ["rabbitmq", "setup-container"]},
        securityContext=_object(
            allowPrivilegeEscalation={"type": "boolean"},
            capabilities=_object(drop={"type": "array", "items": _TEXT}),
        ),
    ),
}
_POD_CONTEXTS = _object(
    ("containers",),
    securityContext=_object(
        runAsNonRoot={"type": "boolean"},
        runAsUser={"type": "integer"},
        runAsGroup={"type": "integer"},
        fsGroup={"type": "integer"},
        seccompProfile=_object(("type",), type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
    ),
    initContainers=_CONTAINERS,
    containers=_CONTAINERS,
)

SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("rabbitmq.com/v1beta1", "RabbitmqCluster"): _object(
        replicas={"type": "integer", "minimum": 0},
        persistence=_object(storage=_TEXT, storageClassName=_TEXT),
        resources=_object(requests=_RESOURCES, limits=_RESOURCES),
        tls=_object(secretName=_TEXT, caSecretName=_TEXT, disableNonTLSListeners={"type": "boolean"}),
        affinity=_object(
            podAntiAffinity=_object(
                requiredDuringSchedulingIgnoredDuringExecution={"type": "array", "items": _ANTI_AFFINITY}
            )
        ),
        rabbitmq=_object(additionalConfig=_TEXT),
        override=_object(statefulSet=_object(spec=_object(template=_object(spec=_POD_CONTEXTS)))),
    ),
    ("rabbitmq.com/v1beta1", "User"): _object(
        ("rabbitmqClusterReference",),
        tags={
            "type": "array",
            "items": {"enum": ["management", "policymaker", "monitoring", "administrator"]},
        },
        rabbitmqClusterReference=_NAME,
    ),
    ("rabbitmq.com/v1beta1", "Permission"): _object(
        ("vhost", "permissions", "rabbitmqClusterReference", "userReference"),
        vhost=_TEXT,
        userReference=_NAME,
        permissions=_object(("configure", "write", "read"), configure=_TEXT, write=_TEXT, read=_TEXT),
        rabbitmqClusterReference=_NAME,
    ),
    ("external-secrets.io/v1", "ExternalSecret"): _object(
        ("secretStoreRef", "target"),
        refreshInterval={"type": "string", "pattern": r"^\d+[smh]$"},
        secretStoreRef=_STORE,
        target=_NAME,
        data={
            "type": "array",
            "items": _object(("secretKey", "remoteRef"), secretKey=_TEXT, remoteRef=_REMOTE),
        },
        dataFrom={"type": "array", "items": _object(("extract",), extract=_REMOTE)},
    ),
}

utils.schema_contents = functools.cache(utils.schema_contents)
utils.all_versions = functools.cache(utils.all_versions)


def versions() -> list[str]:
    """The versions of Kubernetes that are checked, such as `1.30`."""
    known = {tuple(map(int, version.split(".")[:2])) for version in utils.all_versions()}
    return [f"{major}.{minor}" for major, minor in sorted(known) if (major, minor) >= FIRST]


def faults(manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one resource."""
    api, kind = manifest["apiVersion"], manifest["kind"]
    if (api, kind) in SPECS:
        for field in manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}:
            yield f"{field}: unknown field"
        for error in jsonschema.Draft202012Validator(SPECS[api, kind]).iter_errors(manifest.get("spec", {})):
            yield f"{'.'.join(['spec', *map(str, error.absolute_path)])}: {error.message}"
    elif api in MODELS and (model := getattr(import_module(MODELS[api]), kind, None)) is not None:
        manifest = _with_units(manifest)
        try:
            # Strictly: it would take the quantity "2" for a number, and then fail.
            parsed = model.model_validate_json(json.dumps(manifest), strict=True)
        except ValueError as error:
            yield str(error)
        else:
            yield from _lost(manifest, parsed.model_dump(mode="json", by_alias=True, exclude_unset=True), "")
    elif BUILT_IN.match(api):
        for version in versions():
            try:
                utils.validate(manifest, version, strict=True)
            except utils.ValidationError as error:
                yield f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message[:300]}"
            except utils.SchemaNotFoundError as error:
                yield error.message
    else:
        yield f"no schema for {api} {kind}: add one to tests/k8s/schemas.py"


def _with_units(value: Any, place: str = "") -> Any:
    """Give quantities such as `2` a unit: pydantic reads `2` as a number, and then has no text to check."""
    if isinstance(value, list):
        return [_with_units(each) for each in value]
    if not isinstance(value, dict):
        return value
    if place in {"requests", "limits"}:
        return {name: f"{each}m" if str(each).isdigit() else each for name, each in value.items()}
    return {name: _with_units(each, name) for name, each in value.items()}


def _lost(given: Any, kept: Any, place: str) -> Iterator[str]:
    """The fields that a model dropped: it does not know them."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                yield f"{place}.{name}: unknown field".lstrip(".")
            else:
                yield from _lost(value, kept[name], f"{place}.{name}")
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(value, other, f"{place}.{number}")


def main() -> int:
    found = count = 0
    seen = set()
    for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
        for manifest in yaml.load_all(file.read_text("utf-8"), yaml.CSafeLoader):
            text = repr(manifest)
            if text in seen:
                continue
            seen.add(text)
            count += 1
            for fault in faults(manifest):
                found += 1
                name = manifest["metadata"].get("name", "")
                sys.stderr.write(f"{file.name}: {manifest['kind']} {name}: {fault}\n")
    sys.stdout.write(f"{count} resources, {found} faults; Kubernetes {', '.join(versions())}\n")
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main())
