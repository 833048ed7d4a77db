"""The facts about a batch's tasks that are known before its source is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from inferq.schemas.batch import Batch
from inferq.schemas.errors import InvalidTask
from inferq.schemas.s3_url import split_s3_prefix
from inferq.schemas.task import input_fields
from inferq.schemas.types import get_type

JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


def is_prefix(source: str) -> bool:
    """Whether the source is a prefix whose objects are the inputs, and not a JSONL. Raises InvalidTask."""
    return source.startswith("s3:") and not split_s3_prefix(source)[1].endswith(JSONL_ENDINGS)


def defaults_of(batch: Batch) -> dict[str, JsonValue]:
    """The fields of a batch's tasks that a line may override."""
    given: dict[str, JsonValue] = {}
    if batch.task_type is not None:
        given["task_type"] = batch.task_type
    if batch.priority != "normal":
        given["priority"] = batch.priority
    return given | batch.defaults


def input_field(given: Mapping[str, JsonValue]) -> str:
    """The one input field for a file of a folder or prefix. Tasks have the `given` fields already.

    Raises InvalidTask if the task type has none or several.
    """
    name = given.get("task_type")
    if not isinstance(name, str):
        raise InvalidTask("a folder or a prefix needs a task type: say which (--type, task_type)")
    task_type = get_type(name)
    fields = [field for field in input_fields(task_type.task) if field not in given]
    if len(fields) != 1:
        raise InvalidTask(
            f"{name} takes {'no file' if not fields else ' and '.join(fields)} for an input, and a folder or "
            "prefix is a file for each task: write a JSONL of the tasks"
        )
    return fields[0]


def line_of(field: str, url: str, source: str, **about: Any) -> bytes:
    """A line of a source made of files: the URL of the input, and its origin as metadata."""
    line = {field: url, "metadata": {"source": source, **about}}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
