"""The published schemas in docs/schemas: `make lint` checks that they are current, and these that they are sound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parents[2] / "docs/schemas"


def parts_of(value: Any, where: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in `value`, with its place."""
    if isinstance(value, dict):
        yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in items:
        yield from parts_of(part, f"{where}/{name}")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_a_published_document_is_sound(path: Path) -> None:
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if path.name.endswith(".schema.json"):
        Draft202012Validator.check_schema(document)
    references = set()
    for where, part in parts_of(document):
        if isinstance(part.get("$ref"), str):
            references.add(part["$ref"])
        if where.endswith(("/properties", "/default", "/examples")) or "/bindings" in where:
            continue
        if part.get("type") == "array":
            assert "items" in part, where
        examples = part.get("examples", [])
        for value in [*examples, *([part["default"]] if "default" in part else [])]:
            schema = part | {"$defs": document.get("$defs", {}), "components": document.get("components", {})}
            assert Draft202012Validator(schema).is_valid(value), (where, value)
    for reference in references:
        found: Any = document
        for name in reference.removeprefix("#/").split("/"):
            assert name in found, reference
            found = found[name]
    definitions = {f"#/$defs/{name}" for name in document.get("$defs", {})}
    assert definitions <= references
