"""The OpenAPI document: a submission's body has the schema of any installed task type."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from inferq.producer.gateway.problems import MEDIA_TYPE, Problem
from inferq.schemas import RUN_ID, Batch, BatchId, TaskId, installed_types
from inferq.schemas.json_schema import SchemaGenerator

_REF = "#/components/schemas/{model}"
_SET_IF_ABSENT = {"task_id", "batch_id", "created_at"}
"""Required fields that the gateway sets if a request leaves them out."""

_REFUSED = ("batch_line", "schedule")
"""Fields that only other parts than a client may set."""

_PROBLEMS = {
    "4XX": ("Refused", "The request is refused; `code` says why (RFC 9457)"),
    "5XX": (
        "Failed",
        "The request failed; send it again after the seconds of the header Retry-After, if any",
    ),
}
"""The answers of every operation beside its own: status codes, component, description."""

ABOUT: dict[str, Any] = {
    "contact": {"name": "The operator of this gateway"},
    "license_info": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
    "openapi_tags": [
        {"name": "tasks", "description": "Submit tasks, follow them, and get their results."},
        {"name": "batches", "description": "Submit many tasks at once, as JSONL or a prefix in S3."},
        {"name": "callbacks", "description": "See which callbacks were delivered, and send them again."},
        {"name": "files", "description": "Upload inputs, and download the files that tasks made."},
        {"name": "operations", "description": "See the queues, the workers, and what waits or is late."},
        {"name": "health", "description": "Probes and metrics. They need no API key."},
    ],
}
"""Arguments of the FastAPI application that describe it."""


def operation_id(route: APIRoute) -> str:
    """The name of a route's function: generated clients name their functions after it."""
    return route.name


def build(app: FastAPI) -> dict[str, Any]:
    """The document of `app`'s routes, with the schema of each task type."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        contact=app.contact,
        license_info=app.license_info,
        tags=app.openapi_tags,
        routes=app.routes,
        servers=app.servers,
    )
    components: dict[str, Any] = document.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    types = installed_types()
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (Problem, "serialization"),
        (Batch, "validation"),
    ]
    for task_type in types.values():
        models += [(task_type.task, "validation"), (task_type.output, "serialization")]
    references, definitions = models_json_schema(models, ref_template=_REF, schema_generator=SchemaGenerator)
    schemas |= definitions.get("$defs", {})
    _as_requested(schemas["Batch"])
    batch = schemas["Batch"]["properties"]
    batch["batch_id"]["not"] = {"pattern": f"^{RUN_ID.pattern}$"}
    batch["task_type"]["anyOf"][0] = {"type": "string", "enum": [*types]}
    mapping = {}
    for task_type in types.values():
        reference = references[task_type.task, "validation"]["$ref"]
        mapping[task_type.name] = reference
        _as_requested(schemas[reference.rpartition("/")[2]])
    task = {
        "oneOf": [{"$ref": reference} for reference in mapping.values()],
        "discriminator": {"propertyName": "task_type", "mapping": mapping},
    }
    schemas["AnyTask"] = task
    outputs = {name: references[t.output, "serialization"] for name, t in types.items()}
    schemas["Result"] |= _output_by_type(outputs)
    body = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="AnyTask")}}},
    }
    document["paths"]["/v1/tasks"]["post"]["requestBody"] = body
    document["paths"]["/v1/tasks/{task_id}"]["put"]["requestBody"] = body
    problem = {"content": {MEDIA_TYPE: {"schema": references[Problem, "serialization"]}}}
    components["responses"] = {
        name: {"description": description, **problem} for name, description in _PROBLEMS.values()
    }
    ids = {
        "task_id": TypeAdapter(TaskId).json_schema(),
        "batch_id": TypeAdapter(BatchId).json_schema(),
    }
    for path in document["paths"].values():
        for operation in path.values():
            operation.setdefault("security", [])
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"] |= ids.get(parameter["name"], {})
            responses = operation["responses"]
            responses.pop("422", None)
            for code, response in responses.items():
                if int(code) >= 400:
                    response.setdefault("content", problem["content"])
            responses |= {
                code: {"$ref": f"#/components/responses/{name}"} for code, (name, _) in _PROBLEMS.items()
            }
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


def _output_by_type(outputs: dict[str, Any]) -> dict[str, Any]:
    """The part of a result's schema that says which output a task type has."""
    schema: dict[str, Any] = {}
    for name, output in reversed(outputs.items()):
        schema = {
            "if": {"properties": {"task_type": {"const": name}}},
            "then": {"properties": {"output": {"anyOf": [output, {"type": "null"}]}}},
            **({"else": schema} if schema else {}),
        }
    return schema
