"""The batch that a request asks for, checked before anything of its source is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from inferq.producer.batch.checks import check_files, check_lines
from inferq.producer.gateway.problems import Fault, Refused
from inferq.producer.gateway.services import Services
from inferq.schemas import RUN_ID, Batch, InvalidTask, describe_faults, get_type, new_task_id
from inferq.schemas.batch_source import defaults_of, input_field, is_prefix
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import ObjectNotFound

JSONL_GOES_AS = "a JSONL is sent with Content-Type: application/x-ndjson"
"""Said where a body may be one: curl, for example, calls whatever it sends a form."""


def complete(document: dict[str, Any], *, tenant: str, what: str = "the body") -> Batch:
    """The batch that a request asks for, in `what`. Raises Refused and InvalidTask."""
    if document.get("tenant", tenant) != tenant:
        raise Refused(403, "tenant_mismatch", "the API key belongs to another tenant than the batch names")
    if document.get("schedule") is not None:
        raise _invalid("schedule", "is set by nightly runs only: leave it out; `metadata` may say the same")
    stamped = {
        "batch_id": new_task_id(),
        **document,
        "tenant": tenant,
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    try:
        batch = Batch.model_validate_json(_json(stamped, what))
    except ValidationError as error:
        lines = [line.partition(": ") for line in describe_faults(error)]
        if "source" not in document:
            lines = [
                (field, sign, f"{detail} ({JSONL_GOES_AS})" if field == "source" else detail)
                for field, sign, detail in lines
            ]
        faults = tuple(Fault(field=field, detail=detail) for field, _, detail in lines)
        message = "; ".join(f"{fault.field}: {fault.detail}" for fault in faults)
        raise Refused(422, "invalid_batch", message, errors=faults) from error
    if RUN_ID.fullmatch(batch.batch_id):
        raise _invalid(
            "batch_id", "has the form of a nightly run's id: choose one that does not end in a time"
        )
    _check(batch)
    return batch


def _json(document: dict[str, Any], what: str) -> str:
    try:
        return json.dumps(document, allow_nan=False)  # Python reads 1e999, which no JSON can hold
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"{what} is not JSON: {error}", code="not_json") from error


def _check(batch: Batch) -> None:
    """Raises Refused, and InvalidTask for an unknown type, where no line or object could become a task."""
    for name in (batch.task_type, batch.defaults.get("task_type")):
        if name is not None:
            get_type(str(name))
    given = defaults_of(batch)
    with _refusing("source"):
        prefix = is_prefix(batch.source)
    if not prefix:
        with _refusing("defaults"):
            check_lines(given)
        return
    with _refusing("task_type"):
        input_field(given)
    with _refusing("defaults"):
        check_files(given)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """What is found wrong in the block is refused in the name of that field of the batch."""
    try:
        yield
    except InvalidTask as error:
        raise _invalid(field, error.message) from error


def _invalid(field: str, detail: str) -> Refused:
    return Refused(422, "invalid_batch", f"{field}: {detail}", errors=(Fault(field=field, detail=detail),))


async def check_upload(services: Services, batch: Batch) -> None:
    """Raises Refused where the batch's source is an upload that is not there, or empty."""
    scheme, _, file_id = batch.source.partition(":")
    if scheme != "inferq":
        return
    try:
        info = await services.on_store(services.store.stat, upload_key(batch.tenant, file_id))
    except ObjectNotFound as error:
        detail = f"there is no uploaded file {batch.source!r}; upload it first (POST /v1/files)"
        faults = (Fault(field="source", detail=detail),)
        raise Refused(422, "unknown_file", f"source: {detail}", errors=faults) from error
    if info.bytes == 0:
        raise Refused(422, "empty_batch", f"source: {batch.source!r} is empty: it holds no task")
