"""Values at the edges of a JSON Schema, just inside and just outside of what it allows, and a validator for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

Schema = Mapping[str, Any]
Components = Mapping[str, Schema]

ODD = (None, True, False, 0, 1, -1, 1.0, 0.5, "", " ", "1", "true", "a", [], {}, [None], ["a"], {"a": 1})
"""Values of every kind."""


def _pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[ValidationError]:
    # In JSON Schema `$` is the end; in Python it also stands before a line feed at the end.
    if isinstance(value, str) and not re.search(re.sub(r"\$(?=\)?$)", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})


def validator_of(document: Mapping[str, Any], component: str) -> Draft202012Validator:
    """A validator for a component of an OpenAPI document. It checks formats, too."""
    schema = {"$ref": f"#/components/schemas/{component}", "components": document["components"]}
    found: Draft202012Validator = _Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return found


def resolved(schema: Schema, components: Components) -> Schema:
    """The schema that a reference names."""
    return components[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def edges(schema: Schema, components: Components) -> list[Any]:
    """Values near the limits of a field's schema, and those that it names."""
    schema = resolved(schema, components)
    found: list[Any] = [*schema.get("examples", []), *schema.get("enum", [])]
    found += [schema[name] for name in ("const", "default") if name in schema]
    for part in schema.get("anyOf", []):
        found += edges(part, components)
    step = 1 if schema.get("type") == "integer" else 0.5
    for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if name in schema:
            found += [schema[name] - step, schema[name], schema[name] + step]
    for name in ("minLength", "maxLength"):
        if name in schema:
            found += [letter * (schema[name] + by) for by in (-1, 0, 1) for letter in "a "]
    if "items" in schema:
        items = edges(schema["items"], components) or ["a"]
        found += [[item] for item in items]
        for name in ("minItems", "maxItems"):
            if name in schema:
                found += [[items[0]] * (schema[name] + by) for by in (-1, 0, 1)]
    return found
