"""The status index: where each task stands, in Redis. Fast and shared, but not the truth: it may be lost.

Every change is one Lua script, so that it is atomic, and carries an order number, so that it is idempotent
and a late or repeated message never moves a task backwards. The scripts use keys that they work out
themselves: this is for one Redis (or a failover pair), not for a Redis Cluster.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from inferq.schemas import ErrorInfo, Event, InstallationError, Outage, Result, State, Task, TaskStatus
from inferq.schemas.encoding import clean, to_json
from inferq.storage.settings import StorageSettings
from inferq.storage.status import scripts
from inferq.storage.status.fields import (
    as_text,
    batch_place,
    event_json,
    micros,
    read_cursor,
    read_status,
    task_fields,
    write_cursor,
)
from inferq.storage.status.keys import batch_key, record_key

MAX_PAGE = 500
"""The most statuses that one page of a listing holds."""

T = TypeVar("T")

_FAST_FAIL_SECONDS = 1.0
_SCAN_ROUNDS = 20
_MAX_NOTE = 500


class StatusOutage(Outage):
    """Redis, which holds the status index, cannot be reached."""

    code = "status_unavailable"


@dataclass(frozen=True)
class Submission:
    """What became of a submission. `conflict`: the id is taken by a task with another content."""

    new: bool
    confirmed: bool
    conflict: bool
    status: TaskStatus


@dataclass(frozen=True)
class Begun:
    """What stood on record as a run began; `digest` is None where the task was not on record.

    `lost_runs` is how many runs of this attempt began before it, in a row, and came to no orderly end: no
    result, no retry, not given back. Most likely their workers died. None: this run was not counted, since
    the record is further on than its attempt.
    """

    cancel_requested: bool
    digest: str | None
    state: State
    orphaned_runs: int | None = None


@dataclass(frozen=True)
class Page:
    """A part of a listing. `cursor` leads to the next one; it is None at the end."""

    items: tuple[TaskStatus, ...]
    cursor: str | None


class StatusIndex:
    """The status of every task. Safe to use from many threads; any method may raise StatusOutage.

    `retention` is in seconds and counts from a task's last change. After a lost connection every call
    fails at once for a second, but for one that looks whether Redis is back.
    """

    def __init__(
        self, redis: redis.Redis, *, retention: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = redis
        self._retention = max(1, round(retention))
        self._clock = clock
        self._lock = threading.Lock()
        self._own = threading.local()
        self._down_since: float | None = None
        self._down_until: float | None = None
        self._down_reason = ""
        self._scripts = {name: redis.register_script(source) for name, source in scripts.SOURCES.items()}

    @classmethod
    def from_settings(cls, settings: StorageSettings) -> Self:
        try:
            client = redis.Redis.from_url(
                settings.redis_url,
                decode_responses=True,
                socket_timeout=settings.redis_timeout,
                socket_connect_timeout=settings.redis_timeout,
                # A pooled connection may have died since: one more try, but never a second wait.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
                max_connections=1000,
            )
        except ValueError as error:
            # The parser's words may quote a part of the password.
            raise InstallationError(
                "INFERQ_REDIS_URL cannot be read; give redis://[:password@]host:port/database, with special "
                "characters of the password percent-encoded",
                code="bad_settings",
            ) from error
        return cls(client, retention=settings.status_retention)

    @staticmethod
    def channel(tenant: str, task_id: str) -> str:
        """The pub/sub channel that carries a task's events, each the JSON of an inferq.schemas.Event."""
        return f"inferq:events:{tenant}:{task_id}"

    def submit(self, task: Task, *, attempt: int = 1) -> Submission:
        """Put a task on record, not yet confirmed, unless it is there already."""
        reply = self._change(
            "submit", task.tenant, task.task_id, [*task_fields(task), attempt, secrets.token_hex(6)]
        )
        new, confirmed, conflict, *fields = reply
        status = read_status(task.tenant, task.task_id, fields)
        return Submission(new=bool(new), confirmed=bool(confirmed), conflict=bool(conflict), status=status)

    def confirm(self, task: Task) -> bool:
        """The broker has the task; publishes `task.queued`, once. False where another has its id by now."""
        event = event_json("task.queued", task, "queued")
        confirmed: int = self._change("confirm", task.tenant, task.task_id, [*task_fields(task), event])
        return confirmed >= 0

    def confirm_all(self, tasks: Iterable[Task]) -> None:
        """As `confirm`, of many tasks in one round trip."""
        script = self._scripts["confirm"]
        with self._redis.pipeline(transaction=False) as pipe:
            for task in tasks:
                tenant, task_id = task.tenant, task.task_id
                event = event_json("task.queued", task, "queued")
                arguments = [*self._head(tenant, task_id), *task_fields(task), event]
                script(keys=[record_key(tenant, task_id)], args=arguments, client=pipe)
            self._call(pipe.execute)

    def forget(self, task: Task) -> None:
        """Undo `submit` where publishing failed; does nothing once the task is confirmed or has begun."""
        self._change("forget", task.tenant, task.task_id, [task.digest()])

    def begin(
        self,
        task: Task,
        *,
        attempt: int,
        redrives: int,
        worker: str,
        started_at: datetime,
        digest: str | None = None,
        run: str | None = None,
    ) -> Begun:
        """A run begins. A task with another digest than the one on record changes nothing.

        `digest` spares computing the task's where the caller has it. `run` names the run, for a caller that
        may have to repeat the call: a run is counted once.
        """
        return self.begin_pipelined(
            task,
            attempt=attempt,
            redrives=redrives,
            worker=worker,
            started_at=started_at,
            digest=digest or task.digest(),
            run=run or secrets.token_hex(6),
        )()

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
    ) -> Callable[[], Begun]:
        """As `begin`, but only sent: what this gives waits for the answer, so other work can go between."""
        event = event_json("task.started", task, "running", attempt=attempt, redrives=redrives, at=started_at)
        answer = self._start(
            "begin",
            task.tenant,
            task.task_id,
            [*task_fields(task, digest), attempt, redrives, clean(worker), micros(started_at), event, run],
        )

        def begun() -> Begun:
            recorded, cancel, state, lost = answer()
            return Begun(
                cancel_requested=bool(cancel),
                digest=recorded or None,
                state=state,
                orphaned_runs=None if lost < 0 else lost,
            )

        return begun

    def released(self, task: Task, *, attempt: int, redrives: int) -> None:
        """A run that began was given back in good order: it, and those before it, are not lost ones."""
        self._change("released", task.tenant, task.task_id, [attempt, redrives])

    def progress(self, tenant: str, task_id: str, fraction: float, note: str | None) -> None:
        """How far a running task is, from 0 to 1; ignored unless it runs, and where it would go back."""
        fraction = min(max(fraction, 0.0), 1.0) if fraction == fraction else 0.0
        timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._change(
            "progress", tenant, task_id, [repr(round(fraction, 4)), clean(note or "")[:_MAX_NOTE], timestamp]
        )

    def retrying(self, task: Task, *, attempt: int, redrives: int, error: ErrorInfo) -> None:
        """The attempt failed, and another one waits in a retry level."""
        event = event_json("task.retrying", task, "retrying", attempt=attempt, redrives=redrives, error=error)
        self._change(
            "retrying",
            task.tenant,
            task.task_id,
            [*task_fields(task), attempt, redrives, to_json(error), event],
        )

    def ended(self, result: Result) -> bool:
        """The task ended. True for the call that moved it there, False where it already was.

        A failure ends whatever attempt is on record of the same redrive; only a later redrive, or a success,
        moves the task on from there. A success stands for ever.
        """
        return bool(self._change("ended", result.tenant, result.task_id, self._end(result)))

    def ended_pipelined(self, result: Result, output: bytes | None = None) -> Callable[[], bool]:
        """As `ended`, but only sent: what this gives waits for the answer, so other work can go between.

        `output` is the output as JSON text, where the result leaves it out.
        """
        answer = self._start("ended", result.tenant, result.task_id, self._end(result, output))
        return lambda: bool(answer())

    def _end(self, result: Result, output: bytes | None = None) -> Sequence[Any]:
        facts = [
            result.task_type,
            "",
            batch_place(result.batch_id, result.batch_line),
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
        ]

    def request_cancel(self, tenant: str, task_id: str) -> TaskStatus | None:
        """Ask for a task to be cancelled; None where it is unknown. One that has ended stays as it is."""
        fields = self._change("cancel", tenant, task_id, [])
        return read_status(tenant, task_id, fields) if fields else None

    def cancel_requested(
        self, tenant: str, task_id: str, batch_id: str | None = None, line: int | None = None
    ) -> bool:
        """Whether somebody wants the task, its line, or the whole batch that it belongs to cancelled."""
        key = record_key(tenant, task_id)
        if self._call(partial(self._redis.hexists, key, "x")):
            return True
        if batch_id is None:
            return False
        wishes = ["x"] if line is None else ["x", f"x:{line}"]
        found = self._call(partial(self._redis.hmget, batch_key(tenant, batch_id), wishes))
        return any(wish is not None for wish in found)

    def get(self, tenant: str, task_id: str) -> TaskStatus | None:
        reply = self._call(lambda: self._redis.hgetall(record_key(tenant, task_id)))
        fields = [as_text(part) for pair in reply.items() for part in pair]
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

        A creation time before the retention or in the future counts as that limit. A page that had to pass
        over very many others is cut short; its cursor leads on. Raises InvalidTask for a bad cursor.
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

    @property
    def away_for(self) -> float | None:
        """Seconds since Redis was found not to answer; None while it does, as far as is known."""
        since = self._down_since
        return None if since is None else self._clock() - since

    @property
    def retention(self) -> int:
        """Seconds that what is on record is kept after its last change."""
        return self._retention

    def ask(self, call: Callable[[redis.Redis], T]) -> T:
        """Make a call of another's to the same Redis, which counts as away for all or for none."""
        return self._call(lambda: call(self._redis))

    def script(self, source: str) -> Callable[[Sequence[str], Sequence[Any]], Any]:
        """A Lua script of another's, to be called with its keys and arguments."""
        script = self._redis.register_script(source)
        return lambda keys, arguments: self._call(lambda: script(keys=keys, args=arguments))

    def ping(self) -> None:
        """Raises StatusOutage, saying what is wrong, where Redis could not be used."""
        self._call(self._redis.ping)

    def warm_up(self) -> None:
        """As `ping`; makes this thread's connections, and loads the scripts, ahead of their first use."""
        self.ping()
        with suppress(redis.RedisError, OSError):  # the call that needs it will tell
            self._own_connection()
        # On a connection of its own, since the one before is taken now.
        self._call(lambda: [self._redis.script_load(script.script) for script in self._scripts.values()])

    def close(self) -> None:
        self._redis.close()

    def _change(self, name: str, tenant: str, task_id: str, arguments: Sequence[Any]) -> Any:
        return self._run(name, [record_key(tenant, task_id)], [*self._head(tenant, task_id), *arguments])

    def _start(self, name: str, tenant: str, task_id: str, arguments: Sequence[Any]) -> Callable[[], Any]:
        """Send a change, on a connection that this thread keeps; what this gives waits for the answer.

        Whatever goes wrong on that short way, the whole call is made again on the ordinary one: all changes
        may be repeated.
        """

        def whole_call() -> Any:
            return self._change(name, tenant, task_id, arguments)

        if self._down_until is not None:
            return whole_call
        key = record_key(tenant, task_id)
        head = self._head(tenant, task_id)
        own = self._own
        if getattr(own, "awaited", None) is not None:
            self._drop_own_connection()  # an answer was never fetched: it must not pass for the next one
        awaited = object()
        try:
            connection = self._own_connection()
            connection.send_command("EVALSHA", self._scripts[name].sha, 1, key, *head, *arguments)
        except (redis.RedisError, OSError):
            self._drop_own_connection()
            return whole_call
        own.awaited = awaited

        def answer() -> Any:
            if getattr(own, "awaited", None) is not awaited:
                return whole_call()  # fetched already, given up, or asked for on another thread
            try:
                reply = connection.read_response()
            except NoScriptError:
                own.awaited = None
                return whole_call()
            except (redis.RedisError, OSError):
                self._drop_own_connection()
                return whole_call()
            own.awaited = None
            return as_text(reply)

        return answer

    def _own_connection(self) -> Any:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._redis.connection_pool.get_connection()
            self._own.connection = connection
        return connection

    def _drop_own_connection(self) -> None:
        connection = getattr(self._own, "connection", None)
        self._own.awaited = None
        if connection is not None:
            self._own.connection = None
            connection.disconnect()
            self._redis.connection_pool.release(connection)

    def _head(self, tenant: str, task_id: str) -> Sequence[Any]:
        return [tenant, task_id, self._retention, micros(datetime.now(UTC))]

    def _run(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        script = self._scripts[name]
        reply = self._call(lambda: script(keys=keys, args=arguments))
        return as_text(reply)

    def _call(self, command: Callable[[], T]) -> T:
        with self._lock:
            if self._down_until is not None:
                now = self._clock()
                if now < self._down_until:
                    raise StatusOutage(self._down_reason)
                self._down_until = now + _FAST_FAIL_SECONDS  # this caller looks, the others go on failing
        try:
            reply = command()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            reason = (
                f"Redis at {self._address()} cannot be reached: {error}; "
                "check that it runs, and INFERQ_REDIS_URL"
            )
            with self._lock:
                now = self._clock()
                if self._down_since is None:
                    self._down_since = now
                self._down_until = now + _FAST_FAIL_SECONDS
                self._down_reason = reason
            raise StatusOutage(reason) from error
        except redis.RedisError as error:
            raise StatusOutage(f"Redis at {self._address()} refused a command: {error}") from error
        with self._lock:
            self._down_since = self._down_until = None
        return reply

    def _address(self) -> str:
        options = self._redis.connection_pool.connection_kwargs
        path = options.get("path")
        return str(path) if path else f"{options.get('host', '?')}:{options.get('port', '?')}"
