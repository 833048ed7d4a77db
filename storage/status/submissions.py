"""How a task's submission is recorded, confirmed and undone."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from inferq.schemas import Task, TaskStatus
from inferq.storage.status.fields import event_json, read_status, task_fields
from inferq.storage.status.keys import record_key
from inferq.storage.status.script_calls import ScriptCalls


@dataclass(frozen=True)
class Submission:
    """The result of a submission. `conflict`: the id belongs to a task with another content."""

    new: bool
    confirmed: bool
    conflict: bool
    status: TaskStatus


class Submissions(ScriptCalls):
    """The changes that a producer makes. A task's `digest` is computed here if absent."""

    def submit(self, task: Task, digest: str | None = None, *, trace_id: str | None = None) -> Submission:
        """Record a task as not yet confirmed, unless it has a record."""
        arguments = [*task_fields(task, digest, trace_id), secrets.token_hex(6)]
        reply = self._change("submit", task.tenant, task.task_id, arguments)
        new, confirmed, conflict, *fields = reply
        status = read_status(task.tenant, task.task_id, fields)
        return Submission(new=bool(new), confirmed=bool(confirmed), conflict=bool(conflict), status=status)

    def confirm(self, task: Task, digest: str | None = None, *, trace_id: str | None = None) -> bool:
        """The broker has confirmed the task: publish `task.queued`, once. False if another task has its id."""
        event = event_json("task.queued", task, "queued", trace_id=trace_id)
        confirmed: int = self._change(
            "confirm", task.tenant, task.task_id, [*task_fields(task, digest, trace_id), event]
        )
        return confirmed >= 0

    def confirm_all(self, tasks: Iterable[tuple[Task, str]]) -> None:
        """Like `confirm`, for many tasks and their digests in one round trip."""
        script = self._scripts["confirm"]
        calls = []
        for task, digest in tasks:
            tenant, task_id = task.tenant, task.task_id
            event = event_json("task.queued", task, "queued")
            arguments = [*self._head(tenant, task_id), *task_fields(task, digest), event]
            calls.append((record_key(tenant, task_id), arguments))

        def confirm() -> None:
            with self._redis.pipeline(transaction=False) as pipe:
                for key, arguments in calls:
                    script(keys=[key], args=arguments, client=pipe)
                pipe.execute()

        self._call(confirm)

    def forget(self, task: Task, digest: str | None = None) -> None:
        """Undo `submit` after a failed publish. Does nothing once the task is confirmed or has begun."""
        self._change("forget", task.tenant, task.task_id, [digest or task.digest()])
