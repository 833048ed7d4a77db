"""compose.yaml, read as Compose reads it: merged keys, and variables replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tests.images.dockerfile import ROOT

FILE = ROOT / "compose.yaml"
FILES = ROOT / "deploy" / "compose"
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*))?\})")


def services(variables: Mapping[str, str] = {}) -> dict[str, dict[str, Any]]:
    """The services by name. Required variables without a value get their own name as value."""
    return _replaced(project()["services"], variables)


def project() -> dict[str, Any]:
    """The whole file, with its variables as they are written."""
    return yaml.safe_load(FILE.read_text("utf-8"))


def variables() -> dict[str, str | None]:
    """The variables of the file with their defaults; None if one is required."""
    found = _VARIABLE.finditer(FILE.read_text("utf-8"))
    return {m[2]: m[4] if m[3] == "-" else None for m in found if m[2]}


def seconds(duration: str) -> int:
    """A duration in Compose's form, such as 1m30s."""
    assert re.fullmatch(r"(\d+m)?(\d+s)?", duration), duration
    minutes, rest = re.search(r"(\d+)m", duration), re.search(r"(\d+)s", duration)
    return 60 * int(minutes[1] if minutes else 0) + int(rest[1] if rest else 0)


def _replaced(value: Any, variables: Mapping[str, str]) -> Any:
    match value:
        case dict():
            return {key: _replaced(member, variables) for key, member in value.items()}
        case list():
            return [_replaced(member, variables) for member in value]
        case str():
            return _VARIABLE.sub(lambda m: m[1] or variables.get(m[2], m[4] if m[3] == "-" else m[2]), value)
        case _:
            return value
