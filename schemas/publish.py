"""Publishes the schemas for other languages: JSON Schema for each type, and AsyncAPI 3.

`python -m inferq.schemas.publish FOLDER` writes them; with `--check` it only checks that they are current. They
cover the task types of inferq itself; with `--all`, those of every installed plug-in too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from inferq.schemas.batch import Batch, BatchEvent, BatchStatus
from inferq.schemas.json_schema import SchemaGenerator
from inferq.schemas.night import NightEvent
from inferq.schemas.record import SCHEMA_VERSION
from inferq.schemas.result import Result
from inferq.schemas.status import Event, TaskStatus
from inferq.schemas.task import MAX_BODY_BYTES, PRIORITIES
from inferq.schemas.types import TaskType, installed_types

DISTRIBUTION = "inferq"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def documents(types: Mapping[str, TaskType]) -> dict[str, str]:
    """The documents for these task types, by file name."""
    found = {
        "result.schema.json": _schema(Result),
        "status.schema.json": _schema(TaskStatus),
        "event.schema.json": _schema(Event),
        "batch.schema.json": _schema(Batch),
        "batch-status.schema.json": _schema(BatchStatus),
        "batch-event.schema.json": _schema(BatchEvent),
        "night-event.schema.json": _schema(NightEvent),
        "asyncapi.json": asyncapi(types),
    }
    for name, task_type in types.items():
        found[f"task.{name}.schema.json"] = _schema(task_type.task)
        found[f"output.{name}.schema.json"] = _schema(task_type.output)
    return {
        name: json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        for name, content in sorted(found.items())
    }


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"$schema": _DIALECT, **model.model_json_schema(schema_generator=SchemaGenerator)}


def asyncapi(types: Mapping[str, TaskType]) -> dict[str, Any]:
    """The AsyncAPI 3.0 document: the messages to publish, their routing keys, and the events that come back.

    https://www.asyncapi.com/docs/reference/specification/v3.0.0
    """
    models: list[type[BaseModel]] = [*(t.task for t in types.values()), *(e for e, _ in _EVENTS.values())]
    named, shared = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=SchemaGenerator,
    )
    channels: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for name, task_type in types.items():
        messages[name] = {
            "name": name,
            "title": task_type.summary or name,
            "contentType": "application/json",
            "payload": named[(task_type.task, "validation")],
            "headers": {"$ref": "#/components/schemas/TaskHeaders"},
            "bindings": {
                "amqp": {"contentEncoding": "utf-8", "messageType": name, "bindingVersion": "0.3.0"}
            },
        }
        channels[name] = {
            "address": f"task_type.{name}.{{priority}}",
            "description": f"The routing key `task_type.{name}` without a priority means normal.",
            "parameters": {"priority": {"enum": list(PRIORITIES), "default": "normal"}},
            "messages": {name: {"$ref": f"#/components/messages/{name}"}},
            "bindings": {
                "amqp": {
                    "is": "routingKey",
                    "exchange": {"name": "inference.tasks", "type": "topic", "durable": True, "vhost": "/"},
                    "bindingVersion": "0.3.0",
                }
            },
        }
        operations[f"submit_{name}"] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{name}"},
            "summary": f"Submit a task: {task_type.summary or name}.",
            "messages": [{"$ref": f"#/channels/{name}/messages/{name}"}],
            "bindings": {"amqp": {"deliveryMode": 2, "mandatory": True, "bindingVersion": "0.3.0"}},
        }
    for name, (model, title) in _EVENTS.items():
        messages[name] = {
            "name": name,
            "title": title,
            "contentType": "application/json",
            "payload": named[(model, "validation")],
        }
    channels["callbacks"] = {
        "description": "The `callback_url` of a task or batch, or the `callback` of a nightly run: events in "
        "the form of Standard Webhooks, told apart by their `type`.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _EVENTS},
    }
    operations["be_notified"] = {
        "action": "receive",
        "channel": {"$ref": "#/channels/callbacks"},
        "messages": [{"$ref": f"#/channels/callbacks/messages/{name}"} for name in _EVENTS],
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "inferq",
            "version": version(DISTRIBUTION),
            "description": f"Tasks are durable UTF-8 JSON messages of at most {MAX_BODY_BYTES} bytes.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"broker": {"host": "localhost:5672", "protocol": "amqp", "protocolVersion": "0.9.1"}},
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": {**shared["$defs"], "TaskHeaders": _HEADERS}},
    }


_EVENTS: dict[str, tuple[type[BaseModel], str]] = {
    "event": (Event, "A change of a task"),
    "batch_event": (BatchEvent, "The end of a batch"),
    "night_event": (NightEvent, "The summary of a night of a nightly run"),
}
"""The bodies of callbacks, by the names of their messages."""

_HEADERS = {
    "type": "object",
    "description": "All optional. A producer may set `traceparent`; inferq sets the others.",
    "properties": {
        "x-attempt": {"type": "integer", "minimum": 1, "description": "Which attempt this is; 1 if absent."},
        "x-digest": {
            "type": "string",
            "pattern": "^[0-9a-f]{64}$",
            "description": "SHA-256 of the task's content. The part that accepts the task makes it; a worker makes "
            "it if it is absent. Another digest for the same id is refused.",
        },
        "x-version": {
            "type": "integer",
            "minimum": 1,
            "description": f"The version of the message, now {SCHEMA_VERSION}; 1 if absent.",
        },
        "traceparent": {"type": "string", "description": "W3C Trace Context, passed on with every copy."},
    },
}


def main() -> None:
    """Write or check the documents, as the command line says."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--check", action="store_true", help="only check that they are current")
    arguments.add_argument("--all", action="store_true", help="include the types of plug-ins")
    given = arguments.parse_args()
    folder: Path = given.folder
    wanted = documents(
        {n: t for n, t in installed_types().items() if given.all or t.distribution == DISTRIBUTION}
    )
    present = {path.name: path.read_text("utf-8") for path in folder.glob("*.json")}
    if given.check:
        stale = sorted(n for n in wanted.keys() | present.keys() if wanted.get(n) != present.get(n))
        if stale:
            sys.exit(f"stale in {folder}: {', '.join(stale)}; run: make generate")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in present.keys() - wanted.keys():
        (folder / name).unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
