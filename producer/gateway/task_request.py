"""The task that a request asks for, checked as far as its content alone allows."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from inferq.producer.gateway.problems import ProblemError
from inferq.schemas import MAX_BODY_BYTES, InvalidTask, Task, new_task_id, parse_task


def requested_task(document: dict[str, Any], *, tenant: str, task_id: str | None = None) -> Task:
    """The task in a request's body; the gateway adds the id, tenant and time that the body leaves out.

    `task_id` is the id in the path, if any. Raises ProblemError (403) if the body names another tenant and
    (422) if its id is not the path's; InvalidTask for anything wrong with the task itself.
    """
    if document.get("tenant", tenant) != tenant:
        raise ProblemError(
            403, "tenant_mismatch", "the body names another tenant than the API key's; leave `tenant` out"
        )
    if document.get("batch_line") is not None:
        raise ProblemError(422, "invalid_task", "batch_line: only a batch's feeder sets it; leave it out")
    if task_id is not None and document.get("task_id", task_id) != task_id:
        raise ProblemError(
            422, "id_mismatch", "the body's task_id differs from the id in the path; leave it out"
        )
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    completed = {"task_id": task_id or new_task_id(), "created_at": now, **document, "tenant": tenant}
    if completed["created_at"] is None:
        completed["created_at"] = now
    try:
        body = json.dumps(completed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"the body is not JSON: {error}", code="not_json") from error
    task = parse_task(body.encode("utf-8", "surrogatepass"))
    size = len(task.body())
    if size > MAX_BODY_BYTES:
        raise InvalidTask(
            f"the task has {size} bytes, the limit is {MAX_BODY_BYTES}; pass large inputs by URL",
            code="task_too_large",
        )
    return task
