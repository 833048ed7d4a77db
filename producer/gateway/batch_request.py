"""The batch that a request asks for, checked before any of its source is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from inferq.producer.batch.checks import check_files, check_lines
from inferq.producer.gateway.problems import Fault, ProblemError, faults_of, invalid
from inferq.schemas import RUN_ID, Batch, InvalidTask, get_type, new_task_id
from inferq.schemas.batch_source import defaults_of, input_field, is_prefix

SEND_JSONL_AS = "send a JSONL body with Content-Type: application/x-ndjson"
"""Added where a body may be JSONL: curl, for example, declares every body as a form."""


def requested_batch(document: dict[str, Any], *, tenant: str, what: str = "the body") -> Batch:
    """The batch in a request's body or query; `what` names which. Raises ProblemError and InvalidTask."""
    if document.get("tenant", tenant) != tenant:
        raise ProblemError(
            403, "tenant_mismatch", "the batch names another tenant than the API key's; leave `tenant` out"
        )
    if document.get("schedule") is not None:
        raise _invalid("schedule", "is set by nightly runs only; leave it out, or use `metadata`")
    completed = {
        "batch_id": new_task_id(),
        **document,
        "tenant": tenant,
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    try:
        batch = Batch.model_validate_json(_json(completed, what))
    except ValidationError as error:
        faults = faults_of(error)
        if "source" not in document:
            faults = tuple(
                Fault(field="source", detail=f"{fault.detail} ({SEND_JSONL_AS})")
                if fault.field == "source"
                else fault
                for fault in faults
            )
        raise invalid("invalid_batch", *faults) from error
    if RUN_ID.fullmatch(batch.batch_id):
        raise _invalid(
            "batch_id", "has the form of a nightly run's id; choose one that does not end in a time"
        )
    _check(batch)
    return batch


def _json(document: dict[str, Any], what: str) -> str:
    try:
        return json.dumps(document, allow_nan=False)  # Python reads 1e999, which no JSON can hold
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"{what} is not JSON: {error}", code="not_json") from error


def _check(batch: Batch) -> None:
    """Raise ProblemError, or InvalidTask for an unknown type, if no line or object could become a task."""
    for name in (batch.task_type, batch.defaults.get("task_type")):
        if name is not None:
            get_type(str(name))
    defaults = defaults_of(batch)
    with _problem_of_field("source"):
        prefix = is_prefix(batch.source)
    if not prefix:
        with _problem_of_field("defaults"):
            check_lines(defaults)
        return
    with _problem_of_field("task_type"):
        input_field(defaults)
    with _problem_of_field("defaults"):
        check_files(defaults)


@contextmanager
def _problem_of_field(field: str) -> Iterator[None]:
    """Turn an InvalidTask into a problem of that field of the batch."""
    try:
        yield
    except InvalidTask as error:
        raise _invalid(field, error.message) from error


def _invalid(field: str, detail: str) -> ProblemError:
    return invalid("invalid_batch", Fault(field=field, detail=detail))
