"""The status index: the state of each task, in Redis. Fast and shared, but Redis may lose it.

Every change is one Lua script, so it is atomic. It carries an order number, so it is idempotent, and a late or
repeated message never moves a task backwards. The scripts compute some of their keys, so they need a single Redis
(or a failover pair), not a Redis Cluster.
"""

from __future__ import annotations

import logging
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

from inferq.schemas import (
    SCHEMA_VERSION,
    ErrorInfo,
    Event,
    InstallationError,
    Outage,
    Result,
    State,
    Task,
    TaskStatus,
    check_server_url,
)
from inferq.schemas.encoding import clean, to_json
from inferq.storage.lua import read_lua
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
from inferq.storage.status.keys import record_key

MAX_PAGE = 500
"""The most statuses on one page of a listing."""

T = TypeVar("T")

_FAST_FAIL_SECONDS = 1.0
_WARN_SECONDS = 60.0
_SCAN_ROUNDS = 20
_MAX_NOTE = 500

_UNREACHABLE = (redis.ConnectionError, redis.TimeoutError)
_UNSUPPORTED = {"cluster": "a node of a Redis Cluster", "sentinel": "a Redis Sentinel"}

_log = logging.getLogger(__name__)


class StatusOutage(Outage):
    """Redis, which holds the status index, is unavailable."""

    code = "status_unavailable"


@dataclass(frozen=True)
class Submission:
    """The result of a submission. `conflict`: the id belongs to a task with another content."""

    new: bool
    confirmed: bool
    conflict: bool
    status: TaskStatus


@dataclass(frozen=True)
class Begun:
    """The record of a task when a run begins. `digest` is None if the task had no record.

    `orphaned_runs` counts the consecutive runs of this attempt that began before this one and never ended: no
    result, no retry, no requeue. Most likely their workers died. None: this run was not counted, because the
    record is already past its attempt.
    """

    cancel_requested: bool
    digest: str | None
    state: State
    orphaned_runs: int | None = None


@dataclass(frozen=True)
class Page:
    """A page of a listing. `cursor` leads to the next page; it is None on the last one."""

    items: tuple[TaskStatus, ...]
    cursor: str | None


class StatusIndex:
    """The status of every task. Safe from many threads; any method may raise StatusOutage.

    `retention` is in seconds, from a task's last change. While Redis is unavailable, one call per second tries it;
    all others fail at once. A Redis that answers but refuses writes is unavailable, for reads as well.
    """

    def __init__(
        self, redis: redis.Redis, *, retention: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = redis
        self._retention = max(1, round(retention))
        self._clock = clock
        self._lock = threading.Lock()
        self._down_since: float | None = None
        self._down_until: float | None = None
        self._down_reason = ""
        self._warned: float | None = None
        self._prove = redis.register_script(read_lua())
        self._scripts = {name: redis.register_script(source) for name, source in scripts.SOURCES.items()}

    @classmethod
    def from_settings(cls, settings: StorageSettings) -> Self:
        form = "redis://[:password@]host:port/database"
        if not settings.redis_url.startswith("unix:"):
            check_server_url("INFERQ_REDIS_URL", settings.redis_url, schemes=("redis", "rediss"), form=form)
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
            # The parser's message may quote a part of the password.
            raise InstallationError(
                f"INFERQ_REDIS_URL cannot be read; give {form}, with special characters of the password "
                "percent-encoded",
                code="bad_settings",
            ) from error
        return cls(client, retention=settings.status_retention)

    @staticmethod
    def channel(tenant: str, task_id: str) -> str:
        """The pub/sub channel that carries a task's events, each the JSON of an inferq.schemas.Event."""
        return f"inferq:events:{tenant}:{task_id}"

    def submit(self, task: Task, *, attempt: int = 1) -> Submission:
        """Record a task as not yet confirmed, unless it has a record."""
        reply = self._change(
            "submit", task.tenant, task.task_id, [*task_fields(task), attempt, secrets.token_hex(6)]
        )
        new, confirmed, conflict, *fields = reply
        status = read_status(task.tenant, task.task_id, fields)
        return Submission(new=bool(new), confirmed=bool(confirmed), conflict=bool(conflict), status=status)

    def confirm(self, task: Task) -> bool:
        """The broker has confirmed the task: publish `task.queued`, once. False if another task has its id."""
        event = event_json("task.queued", task, "queued")
        confirmed: int = self._change("confirm", task.tenant, task.task_id, [*task_fields(task), event])
        return confirmed >= 0

    def confirm_all(self, tasks: Iterable[Task]) -> None:
        """Like `confirm`, for many tasks in one round trip."""
        script = self._scripts["confirm"]
        calls = []
        for task in tasks:
            tenant, task_id = task.tenant, task.task_id
            event = event_json("task.queued", task, "queued")
            arguments = [*self._head(tenant, task_id), *task_fields(task), event]
            calls.append((record_key(tenant, task_id), arguments))

        def confirm() -> None:
            with self._redis.pipeline(transaction=False) as pipe:
                for key, arguments in calls:
                    script(keys=[key], args=arguments, client=pipe)
                pipe.execute()

        self._call(confirm)

    def forget(self, task: Task) -> None:
        """Undo `submit` after a failed publish. Does nothing once the task is confirmed or has begun."""
        self._change("forget", task.tenant, task.task_id, [task.digest()])

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
        """Record that a run begins. The request is sent; calling the result waits for the reply.

        Work can go on in between. A task whose digest differs from the recorded one changes nothing. `run`
        names the run: a repeated call counts it once.
        """
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

    def released(self, task: Task, *, attempt: int, redrives: int, run: str) -> None:
        """A run was requeued in good order: it and the runs before it are not orphaned.

        Does nothing if `run` is not the latest one that began.
        """
        self._change("released", task.tenant, task.task_id, [attempt, redrives, run])

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
        self, task: Task, *, attempt: int, redrives: int, error: ErrorInfo, digest: str | None = None
    ) -> None:
        """The attempt failed; the next one waits in a retry level. `digest` is made here if absent."""
        event = event_json("task.retrying", task, "retrying", attempt=attempt, redrives=redrives, error=error)
        self._change(
            "retrying",
            task.tenant,
            task.task_id,
            [*task_fields(task, digest), attempt, redrives, to_json(error), event],
        )

    def ended(self, result: Result) -> bool:
        """The task ended. True if this call ended it, False if it had already ended.

        A failure ends any recorded attempt of the same redrive; only a later redrive or a success supersedes it.
        Nothing supersedes a success.
        """
        return bool(self._change("ended", result.tenant, result.task_id, self._end(result)))

    def ended_pipelined(self, result: Result, output: bytes | None = None) -> Callable[[], bool]:
        """Like `ended`, but the request is only sent: calling the result waits for the reply.

        `output` is the output as JSON text, if the result leaves it out.
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
        """Request a task's cancellation; None if it is unknown. An ended task stays unchanged.

        An unknown task may wait in a queue. It is then cancelled when a worker gets it.
        """
        fields = self._change("cancel", tenant, task_id, [])
        return read_status(tenant, task_id, fields) if fields else None

    def cancel_requested(
        self, tenant: str, task_id: str, batch_id: str | None = None, line: int | None = None
    ) -> bool:
        """Whether the task, its line, or its whole batch is to be cancelled."""
        arguments = [batch_id or "", "" if line is None else line]
        return bool(self._change("cancel_requested", tenant, task_id, arguments))

    def untaken_cancel(self, tenant: str, task_id: str, seconds: float) -> str | None:
        """The digest of a task whose cancel was requested `seconds` ago or earlier; None for any other task."""
        ((digest, since),) = self.read(("HMGET", record_key(tenant, task_id), "d", "x"))
        if since is None:
            return None
        age = int(micros(datetime.now(UTC))) - int(since)
        if 0 <= age < seconds * 1e6:  # negative: the clock was ahead
            return None
        return str(as_text(digest)) or None

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

    @property
    def away_for(self) -> float | None:
        """Seconds since Redis became unavailable; None while it is available, as far as known."""
        since = self._down_since
        return None if since is None else self._clock() - since

    @property
    def away_reason(self) -> str:
        """Why Redis was unavailable, the last time that it was; empty if it never was."""
        return self._down_reason

    @property
    def retention(self) -> int:
        """Seconds that a record is kept after its last change."""
        return self._retention

    def ask(self, call: Callable[[redis.Redis], T]) -> T:
        """Make a call that writes to the same Redis, with the same handling of an outage.

        It may be made twice. For a call that only reads, use `read`.
        """
        return self._call(lambda: call(self._redis))

    def read(self, *commands: Sequence[Any]) -> Sequence[Any]:
        """The replies to commands that only read, if Redis accepts writes."""

        def replies() -> Sequence[Any]:
            pipe: Any
            with self._redis.pipeline(transaction=False) as pipe:
                self._prove(client=pipe)
                for command in commands:
                    pipe.execute_command(*command)
                answers: Sequence[Any] = pipe.execute()
                return answers[1:]

        return self._call(replies)

    def script(self, source: str) -> Callable[[Sequence[str], Sequence[Any]], Any]:
        """Register a Lua script; call the result with its keys and arguments."""
        script = self._redis.register_script(source)
        return lambda keys, arguments: self._call(lambda: script(keys=keys, args=arguments))

    def ping(self) -> None:
        """Raises StatusOutage if Redis cannot be reached or refuses writes; the message says why."""
        self._call(self._prove)

    def require_supported(self) -> None:
        """Raises InstallationError if INFERQ_REDIS_URL leads to a node of a Redis Cluster or to a Sentinel.

        Redis may be unavailable; then nothing is known, and nothing is raised.
        """
        with suppress(StatusOutage):
            if (unsupported := self._call(self._unsupported)) is not None:
                raise InstallationError(unsupported, code="bad_settings")

    def warm_up(self) -> None:
        """Open the two connections that a run uses at once and load the scripts. Raises StatusOutage."""

        def open_both() -> None:
            pool = self._redis.connection_pool
            first = pool.get_connection()
            try:
                for script in self._scripts.values():
                    self._redis.script_load(script.script)
                self._prove()
            finally:
                pool.release(first)

        self._call(open_both)

    def close(self) -> None:
        self._redis.close()

    def _change(self, name: str, tenant: str, task_id: str, arguments: Sequence[Any]) -> Any:
        return self._run(name, [record_key(tenant, task_id)], [*self._head(tenant, task_id), *arguments])

    def _start(self, name: str, tenant: str, task_id: str, arguments: Sequence[Any]) -> Callable[[], Any]:
        """Send a change; calling the result waits for the reply.

        Waiting at once would make echo tasks drain 14 % slower, and add 12 % to their median latency. If this way
        fails, the ordinary call repeats the change. Every change may be repeated.
        """
        whole_call = partial(self._change, name, tenant, task_id, arguments)
        if self._down_until is not None:
            return whole_call
        key, head = record_key(tenant, task_id), self._head(tenant, task_id)
        command = ("EVALSHA", self._scripts[name].sha, 1, key, *head, *arguments)
        return _PendingReply(self._redis.connection_pool, command, whole_call)

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
                self._down_until = now + _FAST_FAIL_SECONDS  # this call tries Redis, the others still fail
        try:
            reply = command()
        except _UNREACHABLE as error:
            raise self._unreachable(error) from error
        except redis.RedisError as error:
            reply = self._after_refusal(command, error)
        with self._lock:
            was_down = self._down_since is not None
            self._down_since = self._down_until = None
        if was_down:
            _log.info("Redis at %s is available again", self._address())
        return reply

    def _after_refusal(self, command: Callable[[], T], refused: redis.RedisError) -> T:
        """Make a refused call again on new connections, since the old ones may lead to a former master.

        Raises StatusOutage. If Redis refuses writes altogether, it counts as unavailable from now on.
        """
        self._redis.connection_pool.disconnect(inuse_connections=False)
        try:
            if (unsupported := self._unsupported()) is not None:
                raise self._down(unsupported) from refused
            self._prove()
        except _UNREACHABLE as error:
            raise self._unreachable(error) from error
        except redis.RedisError as error:
            raise self._down(
                f"Redis at {self._address()} refuses writes: {_reason(error)}; "
                "make room or repair it, or set INFERQ_REDIS_URL to the current master"
            ) from error
        try:
            return command()
        except _UNREACHABLE as error:
            raise self._unreachable(error) from error
        except redis.RedisError as error:
            reason = f"Redis at {self._address()} refused a command: {_reason(error)}"
            self._warn_sometimes(reason)
            raise StatusOutage(reason) from error

    def _unsupported(self) -> str | None:
        """Why this kind of Redis cannot be used; None if it can."""
        client: Any = self._redis
        try:
            hello = client.execute_command("HELLO")
        except _UNREACHABLE:
            raise
        except redis.RedisError:
            return None  # Redis before 6.0 has no HELLO
        facts = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=False))
        kind = _UNSUPPORTED.get(as_text(facts.get("mode", facts.get(b"mode"))))
        if kind is None:
            return None
        return (
            f"INFERQ_REDIS_URL leads to {kind} at {self._address()}, which inferq does not support; "
            "give the address of a single Redis, or one that always leads to the current master"
        )

    def _unreachable(self, error: redis.RedisError) -> StatusOutage:
        return self._down(
            f"Redis at {self._address()} cannot be reached: {error}; check that it runs, and INFERQ_REDIS_URL"
        )

    def _down(self, reason: str) -> StatusOutage:
        """Redis is unavailable from now on. Returns the error to raise."""
        with self._lock:
            now = self._clock()
            begins = self._down_since is None
            if begins:
                self._down_since = now
            self._down_until = now + _FAST_FAIL_SECONDS
            self._down_reason = reason
        if begins:
            _log.warning("unavailable: %s", reason)
        return StatusOutage(reason)

    def _warn_sometimes(self, reason: str) -> None:
        with self._lock:
            now = self._clock()
            if self._warned is not None and now - self._warned < _WARN_SECONDS:
                return
            self._warned = now
        _log.warning("%s", reason)

    def _address(self) -> str:
        options = self._redis.connection_pool.connection_kwargs
        path = options.get("path")
        return str(path) if path else f"{options.get('host', '?')}:{options.get('port', '?')}"


def _reason(error: redis.RedisError) -> str:
    """The reason without the place in our script, which Redis adds to it."""
    return str(error).partition(" script: ")[0].rstrip(".")


class _PendingReply:
    """A command sent on a pooled connection, which the reply gives back. Calling it waits for the reply.

    If anything goes wrong, or on a second call, `whole_call` is made instead.
    """

    def __init__(
        self, pool: redis.ConnectionPool, command: Sequence[Any], whole_call: Callable[[], Any]
    ) -> None:
        self._pool = pool
        self._whole_call = whole_call
        self._connection: Any = None
        with suppress(redis.RedisError, OSError):
            self._connection = pool.get_connection()
            try:
                self._connection.send_command(*command)
            except (redis.RedisError, OSError):
                self._release(in_order=False)

    def __call__(self) -> Any:
        connection = self._connection
        if connection is not None:
            try:
                reply = connection.read_response()
            except NoScriptError:
                self._release(in_order=True)
            except (redis.RedisError, OSError):
                self._release(in_order=False)
            else:
                self._release(in_order=True)
                return as_text(reply)
        return self._whole_call()

    def __del__(self) -> None:
        if self._connection is not None:
            self._release(in_order=False)  # the reply was never read: it must not pass for the next one

    def _release(self, *, in_order: bool) -> None:
        connection, self._connection = self._connection, None
        if not in_order:
            connection.disconnect()
        self._pool.release(connection)
