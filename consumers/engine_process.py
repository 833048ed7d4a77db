"""The worker's end of an engine process: starts it, sends it tasks, and ends it when it will not."""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from consumers.engine_messages import (
    Abort,
    Aborted,
    Done,
    Failed,
    Progress,
    Ready,
    Run,
    Unable,
    from_engine,
    send,
)
from schemas import EngineInfo, InstallationError, TransientFailure

_log = logging.getLogger(__name__)

AbortReason = Literal["cancelled", "shutdown"]

_LOOK_SECONDS = 0.25
"""How often a run in progress is asked about: cancelled? over its limit? shutting down?"""


class EngineDied(TransientFailure):
    """The engine process ended while it was computing: a crash, or killed for memory."""

    code = "engine_died"


class RunAborted(Exception):
    """The run was stopped on request. `reason` tells a user's cancel from a shutdown."""

    def __init__(self, reason: AbortReason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Watch:
    """What a run in progress is watched with: both are called a few times a second, from the run's thread."""

    progress: Callable[[float, str], None]
    abort: Callable[[], AbortReason | None]


class EngineProcess:
    """One engine process. All methods belong to one thread, which must outlive the process."""

    def __init__(self, type_name: str) -> None:
        self._type_name = type_name
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self.info: EngineInfo | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs; asks the kernel."""
        return self._process is not None and self._process.poll() is None

    @property
    def usable(self) -> bool:
        """Whether nothing is known that would keep it from another run."""
        return self._pipe is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def spawn(self) -> None:
        """Start the process; it loads its engine while others go on."""
        near, far = multiprocessing.Pipe()
        command = [sys.executable, "-m", "consumers.engine_child", self._type_name]
        with far:
            self._process = subprocess.Popen(
                [*command, str(far.fileno()), str(os.getpid())],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._pipe = near

    @property
    def has_answered(self) -> bool:
        """Whether `wait_ready` would return, or raise, at once."""
        return self._pipe is not None and self._pipe.poll(0)

    def wait_ready(self, *, limit: float, stopping: Callable[[], bool] = lambda: False) -> EngineInfo:
        """Wait, at most `limit` seconds, until the engine is loaded and warmed up.

        Raises InstallationError where it can never work, TransientFailure where another start may,
        RunAborted once `stopping` says so; the process is gone then.
        """
        deadline = time.monotonic() + limit
        try:
            return self._loaded(deadline, limit, stopping)
        except BaseException:
            self.kill()
            raise

    def _loaded(self, deadline: float, limit: float, stopping: Callable[[], bool]) -> EngineInfo:
        pipe = self._pipe
        if pipe is None:
            raise TransientFailure("the engine process was not started", code="engine_load_failed")
        while not pipe.poll(_LOOK_SECONDS):
            if stopping():
                raise RunAborted("shutdown")
            if time.monotonic() > deadline:
                raise TransientFailure(
                    f"the {self._type_name} engine was not ready within {limit:g} s", code="engine_slow_start"
                )
        try:
            answer = from_engine(pipe)
        except (EOFError, OSError) as error:
            raise TransientFailure(
                f"the {self._type_name} engine process ended while loading ({self._ending()})",
                code="engine_load_failed",
            ) from error
        match answer:
            case Ready(engine=info):
                self.info = info
                return info
            case Unable(permanent=True):
                raise InstallationError(answer.message, code=answer.code)
            case Unable():
                raise TransientFailure(answer.message, code=answer.code)
            case _:
                raise TransientFailure(f"the engine began with {answer.kind!r}", code="engine_load_failed")

    def run(self, run: Run, *, watch: Watch, time_limit: float, abort_grace: float) -> Done | Failed:
        """Compute one task. `time_limit` and `abort_grace` in seconds.

        Raises EngineDied, TransientFailure (code `time_limit`) or RunAborted. Unless the engine stopped by
        itself when it was asked to, the process is gone then: `usable` tells.
        """
        pipe = self._pipe
        if pipe is None:
            raise EngineDied("the engine process is not running")
        try:
            send(pipe, run)
            return self._await(pipe, watch, time.monotonic() + time_limit, time_limit, abort_grace)
        except RunAborted:
            raise
        except (EOFError, OSError) as error:
            raise EngineDied(f"the engine process ended during the run ({self._ending()})") from error
        except BaseException:
            # Whatever it was, the run may go on over there: its answer must not meet the next task.
            self.kill()
            raise

    def _await(
        self, pipe: Connection, watch: Watch, deadline: float, time_limit: float, abort_grace: float
    ) -> Done | Failed:
        aborting: AbortReason | None = None
        next_look = time.monotonic() + _LOOK_SECONDS
        poller = select.poll()  # Connection.poll would make a selector for each call
        poller.register(pipe.fileno(), select.POLLIN)
        while True:
            if poller.poll(max(0.0, min(next_look, deadline) - time.monotonic()) * 1000):
                match from_engine(pipe):
                    case Done() | Failed() as answer:
                        # Finished although it was to stop: the work is done, so it counts.
                        return answer
                    case Progress(fraction=fraction, note=note):
                        watch.progress(fraction, note)
                    case Aborted():
                        if aborting is None:
                            raise TransientFailure(
                                "the engine stopped without being asked", code="engine_error"
                            )
                        raise RunAborted(aborting)
                    case unexpected:
                        raise EngineDied(f"the engine process said {unexpected.kind!r} during a run")
            now = time.monotonic()
            if aborting is None and next_look <= now < deadline:
                aborting = watch.abort()
                next_look = now + _LOOK_SECONDS
                if aborting is not None:
                    send(pipe, Abort())
                    next_look = deadline = min(deadline, now + abort_grace)
            if now >= deadline:
                self.kill()
                if aborting is not None:
                    raise RunAborted(aborting)
                raise TransientFailure(
                    f"the run was stopped at its time limit of {time_limit:g} s", code="time_limit"
                )

    def kill(self) -> None:
        """End the process at once, and wait until it and its memory are gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._close_pipe()

    def close(self, timeout: float = 5.0) -> None:
        """Let the engine close by itself, for `timeout` seconds at most."""
        self._close_pipe()  # the engine process takes the closed pipe for a goodbye
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _ending(self) -> str:
        """How the process ended, in words."""
        if self._process is None:
            return "never started"
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipe"
        self._close_pipe()
        if code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name
        return f"{name}, most likely out of memory" if -code == signal.SIGKILL else name
