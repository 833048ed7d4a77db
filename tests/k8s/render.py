"""Writes what `make lint` checks with tools of other environments: `python -m tests.k8s.render FOLDER`.

Each overlay becomes a file. `rest.yaml` holds the resources that no overlay has: those of the other components.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests.images.dockerfile import images
from tests.k8s.manifests import Manifest, components, overlays, render, render_anew


def main() -> None:
    folder = Path(sys.argv[1])
    known: set[str] = set()
    for path in overlays():
        known |= _write(folder / f"{Path(path).name}.yaml", render(path))
    whole = {
        "namespace": "inferq",
        "images": [{"name": f"inferq-{image.target}", "newTag": "check"} for image in images()],
    }
    rest = {_text(each): each for path in components() for each in render_anew(path, **whole)}
    _write(folder / "rest.yaml", [each for text, each in rest.items() if text not in known])


def _write(file: Path, manifests: tuple[Manifest, ...] | list[Manifest]) -> set[str]:
    texts = [_text(each) for each in manifests]
    file.write_text("---\n".join(texts), "utf-8")
    return set(texts)


def _text(manifest: Manifest) -> str:
    return yaml.dump(manifest, Dumper=yaml.CSafeDumper, sort_keys=False)


if __name__ == "__main__":
    main()
