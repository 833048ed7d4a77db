"""The OpenAPI document: a submission's body has the schema of any installed task type."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from inferq.producer.gateway.problems import MEDIA_TYPE, Problem
from inferq.schemas import installed_types

_REF = "#/components/schemas/{model}"
_OPTIONAL_OVER_HTTP = ("task_id",)


def build(app: FastAPI) -> dict[str, Any]:
    """The document of `app`'s routes, with the schema of each task type."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        servers=app.servers,
    )
    schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
    types = installed_types()
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Problem, "serialization")]
    for task_type in types.values():
        models += [(task_type.task, "validation"), (task_type.output, "serialization")]
    references, definitions = models_json_schema(models, ref_template=_REF)
    schemas |= definitions.get("$defs", {})
    mapping = {}
    for task_type in types.values():
        reference = references[task_type.task, "validation"]["$ref"]
        mapping[task_type.name] = reference
        schema = schemas[reference.rpartition("/")[2]]
        # The gateway adds these; on the queue a task always has them.
        schema["required"] = [name for name in schema.get("required", ()) if name not in _OPTIONAL_OVER_HTTP]
        schema["x-inferq-output"] = references[task_type.output, "serialization"]
    task = {
        "oneOf": [{"$ref": reference} for reference in mapping.values()],
        "discriminator": {"propertyName": "task_type", "mapping": mapping},
    }
    schemas["AnyTask"] = task
    body = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="AnyTask")}}},
    }
    document["paths"]["/v1/tasks"]["post"]["requestBody"] = body
    document["paths"]["/v1/tasks/{task_id}"]["put"]["requestBody"] = body
    problem = {
        "description": "Any error: a problem document (RFC 9457)",
        "content": {MEDIA_TYPE: {"schema": references[Problem, "serialization"]}},
    }
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document
