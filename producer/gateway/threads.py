"""Threads for blocking calls, each with a deadline at which its caller goes on without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from inferq.schemas import Outage

T = TypeVar("T")


class Threads:
    """`count` threads that make blocking calls to one service.

    A thread cannot be interrupted. At its deadline a call is abandoned: its caller gets `outage`, its thread stays
    taken until the call ends, and a call that still waits for a thread is never made. So a service that hangs takes
    `count` threads at most, and no caller waits longer than the deadline. For the event loop's thread alone.
    """

    def __init__(self, count: int, *, name: str, seconds: float, outage: Callable[[str], Outage]) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._name = name
        self._seconds = seconds
        self._outage = outage

    async def run(self, call: Callable[[], T]) -> T:
        """Make a call on a thread. Raises `outage` at the deadline, and what the call raises."""
        future = asyncio.wrap_future(self._pool.submit(copy_context().run, call))
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                return await future
        except TimeoutError as error:
            if not deadline.expired():
                raise  # the call's own
            raise self._outage(f"{self._name} did not answer within {self._seconds:g} s") from error

    def close(self) -> None:
        """Drop the calls that still wait for a thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
