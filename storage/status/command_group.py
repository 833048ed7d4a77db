"""Commands that travel to Redis together, and whose replies are read later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hiredis
import redis
from redis.exceptions import NoScriptError

from inferq.storage.status.fields import as_text


class CommandGroup:
    """Commands on one pooled connection: `send` sends all of them at once.

    A reply is read when its callable is called, on any thread; the first call reads all replies of the group. A
    command that was not sent, or whose reply did not come, is made by its whole call instead: a command may run twice.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._commands: list[tuple[Any, ...]] = []
        self._connection: Any = None
        self._replies: dict[int, Any] = {}

    def add(self, command: Sequence[Any], whole_call: Callable[[], Any]) -> Callable[[], Any]:
        """Add a command, before `send`. Calling the result waits for its reply; a second call is a whole call."""
        number = len(self._commands)
        self._commands.append(tuple(command))

        def reply() -> Any:
            with self._lock:
                self._read_all()
                found = number in self._replies
                value = self._replies.pop(number, None)
            return as_text(value) if found else whole_call()

        return reply

    def send(self) -> None:
        """Send the commands. It raises nothing: if this fails, each command is made by its whole call."""
        if not self._commands:
            return
        with suppress(redis.RedisError, OSError):
            self._connection = self._pool.get_connection()
            try:
                # redis-py's own packing looks at every argument first, which costs more than the packing.
                self._connection.send_packed_command([b"".join(map(hiredis.pack_command, self._commands))])
            except (redis.RedisError, OSError):
                self._release(in_order=False)

    def _read_all(self) -> None:
        if self._connection is None:
            return
        for number in range(len(self._commands)):
            try:
                self._replies[number] = self._connection.read_response()
            except NoScriptError:  # a reply like any other
                continue
            except (redis.RedisError, OSError):
                self._release(in_order=False)
                return
        self._release(in_order=True)

    def __del__(self) -> None:
        if self._connection is not None:
            self._release(in_order=False)  # the replies were never read: they must not pass for the next ones

    def _release(self, *, in_order: bool) -> None:
        connection, self._connection = self._connection, None
        if not in_order:
            connection.disconnect()
        self._pool.release(connection)
