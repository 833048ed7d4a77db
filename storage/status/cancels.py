"""Requests to cancel a task, also one that Redis does not know yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from inferq.schemas import TaskStatus
from inferq.storage.status.command_group import CommandGroup
from inferq.storage.status.fields import as_text, micros, read_status
from inferq.storage.status.keys import record_key
from inferq.storage.status.script_calls import ScriptCalls


class Cancels(ScriptCalls):
    """Requests a cancel, and checks for one."""

    def request_cancel(self, tenant: str, task_id: str) -> TaskStatus | None:
        """Request a task's cancellation; None if it is unknown. An ended task stays unchanged.

        An unknown task may wait in a queue. It is then cancelled when a worker gets it.
        """
        fields = self._change("cancel", tenant, task_id, [])
        return read_status(tenant, task_id, fields) if fields else None

    def cancel_requested(
        self,
        tenant: str,
        task_id: str,
        batch_id: str | None = None,
        line: int | None = None,
        *,
        run: str = "",
        running: bool = False,
    ) -> bool:
        """Whether the task, its line, or its whole batch is to be cancelled.

        With `run`, also renews the lease of that run: this is a run's only sign of life. With `running` it takes the
        lease of a task in progress that has none: the run began without Redis.
        """
        return self.cancel_requested_pipelined(tenant, task_id, batch_id, line, run=run, running=running)()

    def cancel_requested_pipelined(
        self,
        tenant: str,
        task_id: str,
        batch_id: str | None = None,
        line: int | None = None,
        *,
        run: str = "",
        running: bool = False,
        group: CommandGroup | None = None,
    ) -> Callable[[], bool]:
        """Like `cancel_requested`, but the request is only sent, or added to `group`.

        Calling the result waits for the reply.
        """
        arguments = _check(batch_id, line, run, running)
        answer = self._start("cancel_requested", tenant, task_id, arguments, group)
        return lambda: bool(answer())

    def untaken_cancel(self, tenant: str, task_id: str, seconds: float) -> str | None:
        """The digest of a task whose cancel was requested `seconds` ago or earlier; None for any other task."""
        ((digest, since),) = self.read(("HMGET", record_key(tenant, task_id), "d", "x"))
        if since is None:
            return None
        age = int(micros(datetime.now(UTC))) - int(since)
        if 0 <= age < seconds * 1e6:  # negative: the clock was ahead
            return None
        return str(as_text(digest)) or None


def _check(batch_id: str | None, line: int | None, run: str, running: bool) -> Sequence[Any]:
    return [batch_id or "", "" if line is None else line, run, int(running)]
