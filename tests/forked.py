"""Parts of inferq in processes of their own, forked from one that has imported them.

A new interpreter needs a second to come so far, and the tests start several hundred parts. What is of the interpreter
itself (its arguments, its imports, what it weighs) is tested with one that `subprocess` starts.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])
_PR_SET_PDEATHSIG = 1

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.forked",
        "inferq.producer.cli.main",
        "inferq.producer.cli.server",
        "inferq.producer.gateway.server",
        "inferq.consumers.worker.cli",
        "inferq.consumers.worker.worker",
        "inferq.consumers.jobs.cli",
        "inferq.consumers.jobs.worker",
    ]
)


class ForkedPart:
    """`inferq` with these arguments, as `subprocess.Popen` would give it. It ends with this process."""

    def __init__(self, *arguments: str, env: Mapping[str, str], log: Path | None = None) -> None:
        self._command = ("inferq", *arguments)
        if log is not None:
            log.touch()
        self._process = _context.Process(target=_run, args=(self._command, dict(env), log), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: tuple[str, ...], env: dict[str, str], log: Path | None) -> None:
    """In the new process: become what a new interpreter would be, and run the command line."""
    gc.freeze()  # the collector would touch, and so copy, all that was there before the fork
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with Path(log or os.devnull).open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.argv = list(command)
    more = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = more + [folder for folder in sys.path if folder not in ("", _ROOT, *more)]
    from inferq.producer.cli.main import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()
