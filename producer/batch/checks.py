"""Checks a batch before its source is read."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import JsonValue, ValidationError
from pydantic_core import ErrorDetails

from inferq.schemas import InvalidTask, Task, get_type, parse_task
from inferq.schemas.batch_source import input_field
from inferq.schemas.types import describe_fault

_SAMPLE_ID = "sample"
_SAMPLE_URL = "inferq:sample"


def check_files(given: Mapping[str, JsonValue]) -> None:
    """Raise InvalidTask if no file of a folder or prefix can become a task with the `given` fields."""
    parse_task({"task_id": _SAMPLE_ID, **given, input_field(given): _SAMPLE_URL})


def check_lines(given: Mapping[str, JsonValue]) -> None:
    """Raise InvalidTask if the `given` defaults have a fault that no line can correct.

    Without a task type it checks only the fields that all types have.
    """
    known = given.get("task_type") is not None
    model = get_type(str(given["task_type"])).task if known else Task
    try:
        model.model_validate_json(json.dumps({"task_id": _SAMPLE_ID, **given}))
    except ValidationError as error:
        faults = [
            describe_fault(fault)
            for fault in error.errors(include_url=False)
            if not _is_up_to_the_line(fault) and (known or fault["type"] != "extra_forbidden")
        ]
        if faults:
            raise InvalidTask("; ".join(faults)) from error


def _is_up_to_the_line(fault: ErrorDetails) -> bool:
    """Whether a line can correct the fault: a missing field, or a conflict between several fields."""
    together = fault["loc"] in {(), ("options",)} and fault["type"] != "model_type"
    return fault["type"] == "missing" or together
