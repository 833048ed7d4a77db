"""The memory of an engine process: its limits, and what it takes of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
from pydantic import ByteSize

from inferq.schemas import InstallationError, TransientFailure
from inferq.schemas.memory import total_memory

_log = logging.getLogger(__name__)

_MEASURE_SECONDS = 1.0
"""The least time between two measurements after a run."""

_REST = 20
"""A measurement reads all processes of the machine. The next one in a run comes this many times later than it took."""


@dataclass(frozen=True)
class MemoryLimits:
    """How much memory an engine process and its children may take, in bytes.

    Beyond `kill_at` it is killed in the middle of a run; None is what it takes when loaded, and nine tenths of the
    rest of the machine's or container's memory. Beyond `replace_at` it takes no other run; None is no limit.
    """

    kill_at: int | None = None
    replace_at: int | None = None


class EngineMemory:
    """Compares what an engine process takes with its limits."""

    def __init__(
        self, type_name: str, limits: MemoryLimits, *, total_memory: Callable[[], int] = total_memory
    ) -> None:
        """`total_memory` gives the bytes of memory that this machine or container has."""
        self._type_name = type_name
        self._limits = limits
        self._total_memory = total_memory
        self._pid = 0
        self._next_measure = 0.0  # in a run
        self._next_growth = 0.0  # after a run
        self.kill_at = limits.kill_at

    def watch(self, pid: int) -> None:
        """From now on, measure this process."""
        self._pid = pid
        self._next_measure = self._next_growth = 0.0

    def check_loaded(self) -> None:
        """Call once the engine is loaded. Raises InstallationError if it alone takes more than the limits allow."""
        use = memory_of(self._pid)
        limits = {
            "INFERQ_ENGINE_MEMORY_LIMIT": self._limits.kill_at,
            "INFERQ_ENGINE_RECYCLE_MEMORY": self._limits.replace_at,
        }
        for name, limit in limits.items():
            if limit is not None and use > limit:
                raise InstallationError(
                    f"the {self._type_name} engine takes {_size(use)} of memory once it is loaded, more than "
                    f"{name}={_size(limit)} leaves it: raise the limit, or load a smaller model",
                    code="engine_memory_limit",
                )
        if self._limits.kill_at is None:
            self.kill_at = _default_limit(use, self._total_memory())

    def check_run(self) -> None:
        """Raise TransientFailure (code `out_of_memory`) if a run takes more than the limit."""
        began, limit = time.monotonic(), self.kill_at
        if limit is None or began < self._next_measure:
            return
        use = memory_of(self._pid)
        now = time.monotonic()
        self._next_measure = now + _REST * (now - began)
        if use > limit:
            raise TransientFailure(
                f"the run was stopped: its engine process took {_size(use)} of memory, more than "
                f"INFERQ_ENGINE_MEMORY_LIMIT={_size(limit)}; raise the limit, or submit smaller tasks",
                code="out_of_memory",
            )

    def has_grown(self) -> bool:
        """Whether the process has grown so much that it is to be replaced before the next run."""
        replace_at, now = self._limits.replace_at, time.monotonic()
        if replace_at is None or now < self._next_growth:
            return False
        self._next_growth = now + _MEASURE_SECONDS
        if (use := memory_of(self._pid)) <= replace_at:
            return False
        _log.info(
            "the %s engine process has grown to %s, beyond INFERQ_ENGINE_RECYCLE_MEMORY=%s",
            self._type_name, _size(use), _size(replace_at),
        )  # fmt: skip
        return True


def memory_of(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared memory counts for each of them."""
    use = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for part in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):  # it may have ended just now
                use += part.memory_info().rss
    return use


def _default_limit(loaded: int, total: int) -> int | None:
    """The memory limit of an engine that takes `loaded` bytes when loaded; None if it takes all that there is."""
    return loaded + (total - loaded) * 9 // 10 if loaded < total else None


def _size(count: int) -> str:
    return ByteSize(count).human_readable(decimal=True)
