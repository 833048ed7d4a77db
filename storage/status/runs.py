"""How a task's runs are recorded: their beginning, their progress and their end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from inferq.schemas import SCHEMA_VERSION, ErrorInfo, Event, Result, State, Task
from inferq.schemas.encoding import clean, to_json
from inferq.storage.status.command_group import CommandGroup
from inferq.storage.status.fields import as_text, event_json, micros, place_of, task_fields
from inferq.storage.status.keys import flight_key, record_key
from inferq.storage.status.script_calls import ScriptCalls
from inferq.storage.status.usage import spent_on

_MAX_NOTE = 500

FAILED_WORK_SECONDS = 60
"""How long nobody waits for work that failed: each task computes it for itself."""


@dataclass(frozen=True)
class Begun:
    """The record of a task when a run begins. `digest` is None if the task had no record.

    `orphaned_runs` counts the consecutive runs of this attempt that began before this one and never ended: no
    result, no retry, no requeue. Most likely their workers died. None: this run was not counted, because the
    record is already past its attempt.

    `other_run`: the lease of another run that is in progress, so that this one has not begun; its text changes with
    each sign of life of that run. Empty: this run has begun.

    `past`: a later attempt or redrive of the task is on record, so that this run has not begun.

    `same_work`: for how many seconds a run of another task has computed the same work, so that this one has not
    begun; None if none does.
    """

    cancel_requested: bool
    digest: str | None
    state: State
    orphaned_runs: int | None = None
    other_run: str = ""
    past: bool = False
    same_work: float | None = None


class Runs(ScriptCalls):
    """The changes that a worker makes."""

    def begin_pipelined(
        self,
        task: Task,
        *,
        attempt: int,
        redrives: int,
        worker: str,
        started_at: datetime,
        digest: str,
        run: str,
        silence: float = 0.0,
        repeats: bool = True,
        trace_id: str | None = None,
        work: str | None = None,
        work_seconds: float = 60.0,
        work_silence: float = 0.0,
        group: CommandGroup | None = None,
    ) -> Callable[[], Begun]:
        """Record that a run begins. The request is sent, or added to `group`; calling the result waits for the reply.

        Work can go on in between. A task whose digest differs from the recorded one changes nothing. `run`
        names the run: a repeated call counts it once. The run does not begin while another one holds the task's
        lease, unless that gave no sign of life for `silence` seconds. `cancel_requested` renews the lease.
        `repeats`: whether it begins although a later attempt is on record.

        `work` names what the task asks for: its key in the result cache. The run does not begin either while the run of
        another task of the tenant computes the same, unless that gave no sign of life for `work_silence` seconds. Else
        others wait for this run until it ends or loses its lease, and `work_seconds` at most.
        """
        event = event_json(
            "task.started", task, "running",
            attempt=attempt, redrives=redrives, at=started_at, trace_id=trace_id,
        )  # fmt: skip
        answer = self._start(
            "begin",
            task.tenant,
            task.task_id,
            [
                *task_fields(task, digest, trace_id),
                attempt,
                redrives,
                clean(worker),
                micros(started_at),
                event,
                run,
                round(silence * 1000),
                int(repeats),
                work or "",
                max(1, round(work_seconds)),
                round(work_silence * 1000),
            ],
            group,
        )

        def begun() -> Begun:
            recorded, cancel, state, lost, other_run, past, same_work = answer()
            return Begun(
                cancel_requested=bool(cancel),
                digest=recorded or None,
                state=state,
                orphaned_runs=None if lost < 0 else lost,
                other_run=other_run,
                past=bool(past),
                same_work=None if same_work < 0 else same_work / 1000,
            )

        return begun

    def are_new(self, tasks: Sequence[tuple[str, str, str]]) -> Sequence[bool]:
        """Which of the tasks (tenant, id, digest) are on record as submitted, and never began: none has ended."""
        records = self.read(
            *(("HMGET", record_key(tenant, task_id), "d", "s") for tenant, task_id, _ in tasks)
        )
        return [
            [as_text(value) for value in record] == [digest, "queued"]
            for record, (_, _, digest) in zip(records, tasks, strict=True)
        ]

    def work_failed(self, tenant: str, work: str) -> None:
        """The work failed. For FAILED_WORK_SECONDS, every task that asks for it is computed without waiting."""
        self.write(lambda redis: redis.set(flight_key(tenant, work), "failed", ex=FAILED_WORK_SECONDS))

    def has_begun(self, tenant: str, task_id: str) -> bool:
        """Whether a run of the task began and neither ended nor was requeued: its worker may have died."""
        (runs,) = self.read(("HGET", record_key(tenant, task_id), "l"))
        return bool(runs)

    def lease(self, tenant: str, task_id: str) -> str:
        """The task's lease, even of a silent run: its text changes with each sign of life. Empty if there is none."""
        (lease,) = self.read(("HGET", record_key(tenant, task_id), "h"))
        return str(as_text(lease) or "")

    def lease_holder(self, tenant: str, task_id: str) -> str:
        """The run that has the task's lease, even if it gives no sign of life; empty if there is none."""
        return self.lease(tenant, task_id).partition(" ")[2]

    def released(
        self,
        task: Task,
        *,
        attempt: int,
        redrives: int,
        run: str,
        keep_lease: bool = False,
        keep_run: bool = False,
    ) -> None:
        """A run was requeued in good order: it and the runs before it are not orphaned, and its lease ends.

        With `keep_lease`, only its message was lost, and the run continues. With `keep_run`, the run counts as one that
        never ended: its engine died while it computed the task. The orphaned runs stay unless `run` is the latest one
        that began.
        """
        arguments = [attempt, redrives, run, int(keep_lease), int(keep_run)]
        self._change("released", task.tenant, task.task_id, arguments)

    def progress(self, tenant: str, task_id: str, fraction: float, note: str | None) -> None:
        """The progress of a running task, from 0 to 1. Ignored if the task is not running, or if it would decrease."""
        fraction = min(max(fraction, 0.0), 1.0) if fraction == fraction else 0.0
        timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._change(
            "progress",
            tenant,
            task_id,
            [repr(round(fraction, 4)), clean(note or "")[:_MAX_NOTE], timestamp, SCHEMA_VERSION],
        )

    def retrying(
        self,
        task: Task,
        *,
        attempt: int,
        redrives: int,
        error: ErrorInfo,
        digest: str | None = None,
        run: str = "",
        engine_seconds: float = 0.0,
        trace_id: str | None = None,
    ) -> None:
        """The attempt failed; the next one waits in a retry level. `digest` is made here if absent.

        Ends the lease of `run`. `engine_seconds` counts in the tenant's usage.
        """
        event = event_json(
            "task.retrying", task, "retrying",
            attempt=attempt, redrives=redrives, error=error, trace_id=trace_id,
        )  # fmt: skip
        self._change(
            "retrying",
            task.tenant,
            task.task_id,
            [
                *task_fields(task, digest, trace_id),
                attempt,
                redrives,
                to_json(error),
                event,
                run,
                *spent_on(datetime.now(UTC), engine_seconds),
            ],
        )

    def ended(self, result: Result) -> bool:
        """The task ended. True if this call ended it, False if it had already ended.

        A failure ends any recorded attempt of the same redrive; only a later redrive or a success supersedes it.
        Nothing supersedes a success.
        """
        return bool(self._change("ended", result.tenant, result.task_id, self._end(result)))

    def ended_pipelined(
        self,
        result: Result,
        output: bytes | None = None,
        *,
        engine_seconds: float | None = None,
        group: CommandGroup | None = None,
    ) -> Callable[[], bool]:
        """Like `ended`, but the request is only sent, or added to `group`: calling the result waits for the reply.

        `output` is the output as JSON text, if the result leaves it out. With `engine_seconds` the task counts in the
        tenant's usage, if this call ends it.
        """
        arguments = self._end(result, output, engine_seconds)
        answer = self._start("ended", result.tenant, result.task_id, arguments, group)
        return lambda: bool(answer())

    def _end(
        self, result: Result, output: bytes | None = None, engine_seconds: float | None = None
    ) -> Sequence[Any]:
        facts = [
            result.task_type,
            "",
            place_of(result.batch_id, result.batch_line, result.trace_id),
            result.digest or "",
            micros(result.created_at),
        ]
        return [
            *facts,
            result.attempts,
            result.redrives,
            result.status,
            micros(result.started_at),
            micros(result.finished_at),
            clean(result.worker or ""),
            to_json(result.error) if result.error else "",
            to_json(Event.of_result(result, output)),
            secrets.token_hex(6),
            *spent_on(result.finished_at, engine_seconds),
            int(result.cached),
        ]
