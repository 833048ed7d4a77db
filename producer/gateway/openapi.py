"""The OpenAPI document: a submission's body has the schema of any installed task type."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from inferq.producer.gateway.problems import MEDIA_TYPE, Problem
from inferq.schemas import Batch, BatchId, TaskId, installed_types

_REF = "#/components/schemas/{model}"
_SET_IF_ABSENT = {"task_id", "batch_id", "created_at"}
"""Required fields that the gateway sets if a request leaves them out."""

_REFUSED = ("batch_line", "schedule")
"""Fields that only other parts than a client may set."""


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
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (Problem, "serialization"),
        (Batch, "validation"),
    ]
    for task_type in types.values():
        models += [(task_type.task, "validation"), (task_type.output, "serialization")]
    references, definitions = models_json_schema(models, ref_template=_REF)
    schemas |= definitions.get("$defs", {})
    _as_requested(schemas["Batch"])
    mapping = {}
    for task_type in types.values():
        reference = references[task_type.task, "validation"]["$ref"]
        mapping[task_type.name] = reference
        schema = schemas[reference.rpartition("/")[2]]
        _as_requested(schema)
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
    ids = {
        "task_id": TypeAdapter(TaskId).json_schema(),
        "batch_id": TypeAdapter(BatchId).json_schema(),
    }
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"] |= ids.get(parameter["name"], {})
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document


def _as_requested(schema: dict[str, Any]) -> None:
    """Turn the schema of a task or batch, as the queue and the store have it, into that of a request's body."""
    schema["required"] = [name for name in schema["required"] if name not in _SET_IF_ABSENT]
    for name in _REFUSED:
        schema["properties"].pop(name, None)
    # The default is the API key's tenant. Generated clients send the defaults that they know.
    schema["properties"]["tenant"].pop("default", None)
