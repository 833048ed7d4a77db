"""Looking up a task, and listing a tenant's."""

from __future__ import annotations

from dataclasses import dataclass

from inferq.schemas import State, TaskStatus
from inferq.storage.status.fields import read_cursor, read_status, write_cursor
from inferq.storage.status.script_calls import ScriptCalls

MAX_PAGE = 500
"""The most statuses on one page of a listing."""

_SCAN_ROUNDS = 20


@dataclass(frozen=True)
class Page:
    """A page of a listing. `cursor` leads to the next page; it is None on the last one."""

    items: tuple[TaskStatus, ...]
    cursor: str | None


class Lookup(ScriptCalls):
    """Read the status of one task, or of many."""

    def get(self, tenant: str, task_id: str) -> TaskStatus | None:
        fields = self._change("get", tenant, task_id, [])
        return read_status(tenant, task_id, fields) if fields else None

    def list(
        self,
        tenant: str,
        *,
        task_type: str | None = None,
        state: State | None = None,
        batch_id: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page:
        """The tenant's tasks, newest first (by creation, then by id), at most MAX_PAGE at once.

        A creation time before the retention or in the future counts as that limit. A page that had to skip very
        many tasks may be short; its cursor continues the listing. Raises InvalidTask for a bad cursor.
        """
        limit = min(max(limit, 1), MAX_PAGE)
        score, last = read_cursor(cursor) if cursor else ("", "")
        items: list[tuple[str, str, TaskStatus]] = []
        for _ in range(_SCAN_ROUNDS):
            wanted = limit + 1 - len(items)
            reply = self._run(
                "list",
                [],
                [tenant, task_type or "", state or "", batch_id or "", score, last, wanted],
            )
            score, last, *rows = reply
            items += [(row[0], row[1], read_status(tenant, row[1], row[2])) for row in rows]
            if len(items) > limit:
                items = items[:limit]
                score, last = items[-1][:2]
                break
            if not last:
                break
        return Page(
            items=tuple(status for *_, status in items), cursor=write_cursor(score, last) if last else None
        )
