"""How models become JSON Schema, where client generators and linters need another form than pydantic's."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema


class SchemaGenerator(GenerateJsonSchema):
    """Describes a tuple of equal items, such as a point, as an array with `items`."""

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        found: dict[str, Any] = super().tuple_schema(schema)
        places = found.get("prefixItems", [])
        if places and "items" not in found and all(place == places[0] for place in places):
            found["items"] = found.pop("prefixItems")[0]
        return found
