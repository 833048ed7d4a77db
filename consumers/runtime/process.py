"""The worker's end of an engine process: starts it, sends it tasks, and kills it if it does not stop."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from inferq.consumers.runtime.channel import Channel, Unreadable
from inferq.consumers.runtime.group import Fault, GroupRun
from inferq.consumers.runtime.memory import EngineMemory, MemoryLimits
from inferq.consumers.runtime.messages import (
    Abort,
    Aborted,
    Done,
    Failed,
    FileRef,
    Job,
    LoadFailed,
    Prepare,
    Progress,
    Ready,
    Run,
    RunGroup,
    from_engine,
    send,
)
from inferq.consumers.runtime.output import EngineOutput
from inferq.consumers.runtime.process_tree import kill_engine
from inferq.consumers.runtime.runs import (
    LOOK_SECONDS,
    SEND_SECONDS,
    AbortReason,
    BatchHooks,
    EngineDied,
    OverTime,
    RunAborted,
    RunHooks,
)
from inferq.consumers.runtime.start import start
from inferq.schemas import EngineInfo, InstallationError, TransientFailure

__all__ = [
    "LOOK_SECONDS", "AbortReason", "BatchHooks", "EngineDied", "EngineProcess", "Job", "OverTime", "RunAborted",
    "RunHooks", "Wear",
]  # fmt: skip

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.01
"""How often a process that should end is checked."""

_KILL_SECONDS = 30.0
"""How long a killed process may take to end; one that hangs in a driver may never do."""


Wear = Literal["max_tasks", "memory", "out_of_memory"]
"""Why a working engine process is replaced: its number of tasks, its growth, or memory that ran out in a run."""


class EngineProcess:
    """One engine process, for one thread at a time. The thread that starts it must outlive it."""

    def __init__(
        self,
        type_name: str,
        limits: MemoryLimits | None = None,
        *,
        idle_seconds: float = 0.005,
        lines_dropped: Callable[[int], object] = lambda _count: None,
    ) -> None:
        """`prepare` wakes the process only if it has been idle for `idle_seconds`.

        `lines_dropped` is called with the number of lines of its output that were not logged.
        """
        self._type_name = type_name
        self._memory = EngineMemory(type_name, limits or MemoryLimits())
        self._idle_seconds = idle_seconds
        self._lines_dropped = lines_dropped
        self._output: EngineOutput | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Channel | None = None
        self._prepared: str | None = None
        self._answered_at = 0.0
        self._run_began: float | None = None
        self._run_due: float | None = None
        self.info: EngineInfo | None = None
        self.batch_size = 1
        self.tasks = 0
        self.worn: Wear | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs; asks the kernel."""
        if self._process is None or self._process.returncode is not None:
            return False
        # An ended process stays a zombie until its group is gone: so no other process gets the group's id.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def usable(self) -> bool:
        """Whether it can take another run, as far as is known; `worn` says why it is to be replaced."""
        return self._pipe is not None and self.worn is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def spawn(self) -> None:
        """Start the process; it loads its engine while others go on."""
        self.tasks, self.worn = 0, None
        self._prepared, self._answered_at = None, 0.0
        if self.alive:
            raise InstallationError(
                f"the {self._type_name} engine process {self.pid} cannot be killed: most likely it hangs in a "
                "driver or on a file system, and keeps its GPU memory; restart the machine",
                code="engine_unkillable",
            )
        started = start(self._type_name)
        self._process, self._pipe = started.process, Channel(started.channel)
        self._output = EngineOutput(self._lines_dropped, started.output)
        self._output.start()
        self._memory.watch(self._process.pid)

    @property
    def has_answered(self) -> bool:
        """Whether `wait_ready` would return, or raise, at once."""
        try:
            return self._pipe is not None and (self._pipe.poll() or not self.alive)
        except Unreadable:
            return True

    def wait_ready(self, *, limit: float, stopping: Callable[[], bool] = lambda: False) -> EngineInfo:
        """Wait, at most `limit` seconds, until the engine is loaded and warmed up.

        Raises InstallationError if it can never work here, TransientFailure if another start may work, and
        RunAborted if `stopping` says so. The process is gone then.
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
        try:
            while not pipe.poll(LOOK_SECONDS):
                self._check_lives()
                if stopping():
                    raise RunAborted("shutdown")
                if time.monotonic() > deadline:
                    raise TransientFailure(
                        f"the {self._type_name} engine was not ready within {limit:g} s; "
                        "if it needs longer, raise INFERQ_START_LIMIT",
                        code="engine_slow_start",
                    )
            answer = from_engine(pipe)
        except (EOFError, OSError) as error:
            raise TransientFailure(
                f"the {self._type_name} engine process ended while loading ({self._ending()})",
                code="engine_load_failed",
            ) from error
        except Unreadable as error:
            raise TransientFailure(
                f"the {self._type_name} engine process cannot be understood: {error}",
                code="engine_load_failed",
            ) from error
        match answer:
            case Ready(engine=info):
                self._memory.check_loaded()
                self.info, self.batch_size = info, answer.batch_size
                return info
            case LoadFailed(permanent=True):
                raise InstallationError(answer.message, code=answer.code)
            case LoadFailed():
                raise TransientFailure(answer.message, code=answer.code)
            case _:
                raise TransientFailure(f"the engine began with {answer.kind!r}", code="engine_load_failed")

    def prepare(self, task: str) -> None:
        """Send the task (its JSON) that is likely to run next; it may still not run.

        An idle process parses it while other services answer. Waking a process that has just become idle would
        cost more than that saves.
        """
        self._prepared = None
        if self._pipe is not None and time.monotonic() > self._answered_at + self._idle_seconds:
            self._prepared = task
            with suppress(OSError):  # the run will tell
                send(self._pipe, Prepare(task=task), SEND_SECONDS)

    def run(
        self,
        task: str,
        scratch: str,
        inputs: Mapping[str, FileRef],
        *,
        watch: RunHooks,
        time_limit: float,
        abort_grace: float,
    ) -> Done | Failed:
        """Compute a task (its JSON). `time_limit` and `abort_grace` in seconds.

        Raises EngineDied, OverTime, TransientFailure (code `out_of_memory`) or RunAborted. The process is gone
        then, unless the engine stopped by itself when asked to: see `usable`.
        """
        pipe, output = self._pipe, self._output
        if pipe is None or output is None:
            raise EngineDied("the engine process is not running")
        output.begin_run()
        try:
            prepared, self._prepared = task == self._prepared, None
            body = None if prepared else task
            self._begin_run(time_limit + abort_grace)
            self._give(pipe, Run(task=body, scratch=scratch, inputs=dict(inputs), time_limit=time_limit))
            answer = self._await(pipe, watch, time_limit, abort_grace)
        except (RunAborted, OverTime):
            raise
        except Unreadable as error:
            self.kill()
            raise EngineDied(f"the engine process was killed: {error}") from error
        except (EOFError, OSError) as error:
            raise EngineDied(f"the engine process ended during the run ({self._ending()})") from error
        except BaseException:
            # The run may go on in the other process; its answer must not reach the next task.
            self.kill()
            raise
        finally:
            self._run_began = self._run_due = None
            output.end_run()
        self._end_run(1, out_of_memory=isinstance(answer, Failed) and answer.out_of_memory)
        return answer

    def run_batch(self, jobs: Sequence[Job], *, watch: BatchHooks, abort_grace: float, most: int) -> None:
        """Compute the jobs of a group in batches of at most `most`; `watch.ended` gets the end of each.

        `abort_grace` in seconds. Raises only what the hooks raise. See `usable` for whether the process is gone.
        """
        pipe, output = self._pipe, self._output
        run = GroupRun(jobs, watch, abort_grace, look=self._look, begin=self._begin_run)
        if pipe is None or output is None:
            run.give_up("engine_died", "the engine process is not running")
            return
        self._prepared = None
        output.begin_run()
        fault: Fault = "engine_died"
        try:
            self._give(pipe, RunGroup(jobs=tuple(jobs), most=most))
            message = (
                None if run.follow(pipe) else "the engine process was killed: it did not stop when asked to"
            )
        except (EngineDied, Unreadable) as error:
            message = f"the engine process was killed: {error}"
        except TransientFailure as error:  # it takes too much memory
            fault, message = "out_of_memory", error.message
        except (EOFError, OSError):
            message = f"the engine process ended during the run ({self._ending()})"
        except BaseException:
            self.kill()
            raise
        finally:
            self._run_began = self._run_due = None
            output.end_run()
        if message is not None:
            self.kill()
            run.give_up(fault, message)
        self._end_run(run.answered, out_of_memory=run.out_of_memory)

    def _begin_run(self, seconds: float) -> None:
        """A run, or a batch, begins; it is overdue after `seconds`."""
        self._run_began = time.monotonic()
        self._run_due = self._run_began + seconds

    def _end_run(self, tasks: int, *, out_of_memory: bool) -> None:
        self._answered_at = time.monotonic()
        self.tasks += tasks
        if out_of_memory:
            self.worn = "out_of_memory"
        elif self._pipe is not None and self._memory.has_grown():
            self.worn = "memory"

    def _give(self, pipe: Channel, run: Run | RunGroup) -> None:
        try:
            send(pipe, run, SEND_SECONDS)
        except TimeoutError as error:
            raise EngineDied(f"the engine process did not take the task within {SEND_SECONDS:g} s") from error

    def _await(self, pipe: Channel, watch: RunHooks, time_limit: float, abort_grace: float) -> Done | Failed:
        now = time.monotonic()
        deadline, next_look = now + time_limit, now + LOOK_SECONDS
        while True:
            if pipe.poll(min(next_look, deadline) - time.monotonic()):
                match from_engine(pipe):
                    case Done() | Failed() as answer:
                        return answer
                    case Progress(fraction=fraction, note=note):
                        watch.progress(fraction, note)
                    case Aborted():
                        raise TransientFailure("the engine stopped without being asked", code="engine_error")
                    case unexpected:
                        raise EngineDied(f"the engine process said {unexpected.kind!r} during a run")
            now = time.monotonic()
            if next_look <= now < deadline:
                self._look()
                if (reason := watch.abort()) is not None:
                    finished = self._stop(pipe, abort_grace)
                    if finished is not None and time.monotonic() < deadline:
                        # It finished before it stopped: the work is done, so it counts.
                        return finished
                    raise RunAborted(reason)
                next_look = now + LOOK_SECONDS
            if now >= deadline:
                self._stop(pipe, abort_grace)
                raise OverTime(time_limit)

    def _stop(self, pipe: Channel, abort_grace: float) -> Done | Failed | None:
        """Ask the engine to stop, and kill it if it does not within `abort_grace` seconds.

        Gives the answer if the run finished first.
        """
        deadline = time.monotonic() + abort_grace
        with suppress(EOFError, OSError, Unreadable):  # it has ended already
            send(pipe, Abort(), abort_grace)
            while (left := deadline - time.monotonic()) > 0 and pipe.poll(left):
                match from_engine(pipe):
                    case Done() | Failed() as answer:
                        return answer
                    case Aborted():
                        return None
        self.kill()
        return None

    def _check_lives(self) -> None:
        """Raises EOFError if the process ended and its pipe is read: a fork of it may keep the pipe open."""
        if not self.alive and self._pipe is not None and not self._pipe.poll():
            raise EOFError

    def _look(self) -> None:
        """Raises EOFError as `_check_lives`, TransientFailure (code `out_of_memory`) if it takes too much memory."""
        self._check_lives()
        try:
            self._memory.check_run()
        except TransientFailure:
            self.kill()
            self.worn = "out_of_memory"
            raise

    def kill(self) -> None:
        """Kill the process and everything it started; wait until they are gone."""
        process = self._process
        if process is not None and process.returncode is None and not kill_engine(process, _KILL_SECONDS):
            _log.error(
                "the %s engine process %d does not end though it was killed", self._type_name, process.pid
            )
        self._close_pipe()
        if self._output is not None:
            self._output.close()

    @property
    def run_seconds(self) -> float | None:
        """How long the run in progress has taken; None if there is none. For any thread."""
        began = self._run_began
        return None if began is None else time.monotonic() - began

    @property
    def overdue(self) -> float:
        """Seconds that the run in progress is beyond its time limit and the time to stop; 0 if it is not.

        For any thread.
        """
        due = self._run_due
        return 0.0 if due is None else max(0.0, time.monotonic() - due)

    def kill_overdue(self) -> None:
        """Kill the process from another thread: its own does not come to it. That one does all the rest."""
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self, timeout: float = 5.0) -> None:
        """Let the engine close itself within `timeout` seconds; then kill it and everything it started."""
        self._close_pipe()  # the engine process ends when its pipe closes
        self._wait(timeout)
        self.kill()

    def _wait(self, timeout: float) -> bool:
        """Whether the process has ended within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(_WAIT_SECONDS)
        return True

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _ending(self) -> str:
        """How the process ended, in words."""
        if self._process is None:
            return "never started"
        ended = self._wait(1.0)
        self.kill()
        if not ended:
            return "closed its pipe"
        code = self._process.returncode
        if code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name
        return f"{name}, most likely out of memory" if -code == signal.SIGKILL else name
