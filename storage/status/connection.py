"""The connection to Redis, and its outages."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import redis

from inferq.schemas import InstallationError, Outage
from inferq.storage.lua import read_lua
from inferq.storage.status.fields import as_text

T = TypeVar("T")

_FAST_FAIL_SECONDS = 1.0
_WARN_SECONDS = 60.0

_UNREACHABLE = (redis.ConnectionError, redis.TimeoutError)
_UNSUPPORTED = {"cluster": "a node of a Redis Cluster", "sentinel": "a Redis Sentinel"}

_log = logging.getLogger(__name__)


class StatusOutage(Outage):
    """Redis, which holds the status index, is unavailable."""

    code = "status_unavailable"


class RedisConnection:
    """Calls to Redis. Safe from many threads; any method may raise StatusOutage.

    While Redis is unavailable, one call per second tries it; all others fail at once. A Redis that answers but
    refuses writes is unavailable, for reads as well.
    """

    def __init__(self, redis: redis.Redis, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._lock = threading.Lock()
        self._down_since: float | None = None
        self._down_until: float | None = None
        self._down_reason = ""
        self._warned: float | None = None
        self._prove = redis.register_script(read_lua())

    @property
    def unavailable_for(self) -> float | None:
        """Seconds since Redis became unavailable; None while it is available, as far as known."""
        since = self._down_since
        return None if since is None else self._clock() - since

    @property
    def unavailable_reason(self) -> str:
        """Why Redis was unavailable, the last time that it was; empty if it never was."""
        return self._down_reason

    def write(self, call: Callable[[redis.Redis], T]) -> T:
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

    def quiet_script(self, source: str) -> Callable[[Sequence[str], Sequence[Any]], bool]:
        """Register a Lua script that nothing depends on. Call the result with its keys and arguments.

        It gives whether Redis ran the script. A failure does not count as an outage; only a refusal is logged.
        """
        script = self._redis.register_script(source)

        def call(keys: Sequence[str], arguments: Sequence[Any]) -> bool:
            if self._down_until is not None:
                return False
            try:
                script(keys=keys, args=arguments)
            except redis.ResponseError as error:  # such as a right that the user lacks
                self._warn_sometimes(f"Redis at {self._address()} refused a command: {_reason(error)}")
                return False
            except (redis.RedisError, OSError):
                return False
            return True

        return call

    def ping(self) -> None:
        """Raises StatusOutage if Redis cannot be reached or refuses writes; the message says why."""
        self._call(self._prove)

    def require_supported(self) -> None:
        """Raises InstallationError if INFERQ_REDIS_URL leads to a node of a Redis Cluster or to a Sentinel.

        Redis may be unavailable; then nothing is known, and nothing is raised. A Redis that drops keys is warned of.
        """
        with suppress(StatusOutage):
            if (unsupported := self._call(self._unsupported)) is not None:
                raise InstallationError(unsupported, code="bad_settings")
            if (policy := self._call(self._eviction)) is not None:
                _log.warning(
                    "Redis at %s drops keys when its memory is full (maxmemory-policy %s): tasks can vanish from the "
                    "status, with their cancels and counts; set maxmemory-policy noeviction",
                    self._address(),
                    policy,
                )

    def close(self) -> None:
        self._redis.close()

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
                "make room or repair it, or set INFERQ_REDIS_URL to the current master and a database that it has"
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

    def _eviction(self) -> str | None:
        """The policy by which Redis drops keys; None if it drops none, or does not say."""
        try:
            memory: Any = self._redis.info("memory")
        except _UNREACHABLE:
            raise
        except redis.RedisError:  # a user without the right to ask
            return None
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        return policy if memory.get("maxmemory") and policy != "noeviction" else None

    def _unreachable(self, error: redis.RedisError) -> StatusOutage:
        return self._down(f"Redis at {self._address()} {_fault(error)}")

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


def _fault(error: redis.RedisError) -> str:
    """What is wrong with a connection that failed, and what to correct."""
    if isinstance(error, redis.AuthenticationError):
        return f"refuses the login: {_reason(error)}; correct the user and password in INFERQ_REDIS_URL"
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return (
            f"has a certificate that cannot be trusted: {error.__context__.verify_message}; name the file of its CA in "
            "INFERQ_REDIS_URL (?ssl_ca_certs=FILE), and the host as the certificate does"
        )
    return f"cannot be reached: {_reason(error)}; check that it runs, and INFERQ_REDIS_URL"


def _reason(error: redis.RedisError) -> str:
    """The reason without the place in our script, which Redis adds to it."""
    return str(error).partition(" script: ")[0].rstrip(".")
