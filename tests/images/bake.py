"""What docker-bake.hcl builds."""

from __future__ import annotations

from dataclasses import dataclass

import hcl2

from tests.images.dockerfile import ROOT

BAKE_FILE = ROOT / "docker-bake.hcl"


@dataclass(frozen=True)
class BakeTarget:
    """One entry of a matrix: what it is called, the Dockerfile's target, tags and build arguments."""

    name: str
    target: str
    tags: tuple[str, ...]
    arguments: dict[str, str]


def variables() -> dict[str, str]:
    """The variables with their defaults."""
    return {
        _text(name): _text(body["default"]) for entry in _read()["variable"] for name, body in entry.items()
    }


def targets() -> dict[str, list[BakeTarget]]:
    """The targets by the name of their matrix."""
    return {
        _text(group): [
            BakeTarget(
                name=_filled(body["name"], image),
                target=_filled(body["target"], image),
                tags=tuple(_filled(tag, image) for tag in body["tags"]),
                arguments=dict(body.get("args", {})),
            )
            for image in map(_text, body["matrix"]["image"])
        ]
        for entry in _read()["target"]
        for group, body in entry.items()
    }


def groups() -> dict[str, list[str]]:
    """The members of each group."""
    return {
        _text(name): [_text(member) for member in body["targets"]]
        for entry in _read()["group"]
        for name, body in entry.items()
    }


def _read() -> dict[str, list[dict[str, dict[str, object]]]]:
    return hcl2.loads(BAKE_FILE.read_text("utf-8"))


def _text(value: object) -> str:
    return str(value).strip('"')


def _filled(value: object, image: str) -> str:
    text = _text(value)
    return image if text == "image" else text.replace("${image}", image)
