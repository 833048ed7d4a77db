"""Processes that are killed on purpose, started again, and never left behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import psutil

from inferq.producer.up import orphan_reaper
from inferq.producer.up.part import Part
from inferq.producer.up.process import last_lines, spawn

_LOOK_SECONDS = 0.05


class Crew:
    """All processes of a chaos run, and what they start themselves: none outlives it, however it ends.

    A process of its own watches over that, since the run may be killed like anything else here.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._mark = f"chaos-{secrets.token_hex(8)}"
        # The kernel ends a child when the thread that started it ends: this one lives as long as the crew.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")

    def __enter__(self) -> Self:
        self._guard = subprocess.Popen(
            [sys.executable, orphan_reaper.__file__, self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            orphan_reaper.kill_all(set(), self._mark)
        finally:
            self._guard.communicate()
            self._spawner.shutdown()

    def start(self, part: Part, *, log: str | None = None) -> Process:
        """Start a part, without waiting until it works."""
        # Nothing here is worth a gentle end once the run is over.
        marked = replace(part, gentle=False)
        path = self._logs / f"{log or part.name}.log"
        return Process(self._spawner.submit(spawn, marked, path, mark=self._mark).result(), marked, path)


class Process:
    """One started part."""

    def __init__(self, popen: subprocess.Popen[bytes], part: Part, log: Path) -> None:
        self._popen = popen
        self.part = part
        self.log = log

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def ended(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._popen.poll()

    def wait_ready(self) -> None:
        """Wait until it works. Raises RuntimeError, with the end of its log, where it does not."""
        end = time.monotonic() + self.part.start_limit
        while (reason := self.part.probe()) is not None:
            if self.ended is not None or time.monotonic() > end:
                lines = "\n".join(last_lines(self.log, 20))
                raise RuntimeError(f"{self.part.name} did not start ({self.ended}): {reason}\n{lines}")
            time.sleep(_LOOK_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it as a power failure would."""
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> None:
        """Ask it to stop, wait for its grace, then kill it; whatever it left in its session too."""
        # One that is suspended would not hear of it.
        self.signal(signal.SIGCONT)
        self.signal(self.part.stop_signal)
        try:
            self._popen.wait(self.part.grace)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        orphan_reaper.kill_all({self.pid})

    def children(self) -> list[int]:
        """The pids of its living children."""
        with suppress(psutil.Error):
            return [child.pid for child in psutil.Process(self.pid).children()]
        return []


class Kept:
    """A part that a supervisor keeps: started again whenever it ends, as a container would be.

    With `until_success` it is left alone once it has ended with status 0. `pause` is in seconds.
    """

    def __init__(self, crew: Crew, part: Part, *, until_success: bool = False, pause: float = 0.1) -> None:
        self.part = part
        self.starts = 0
        self.succeeded = False
        self._crew = crew
        self._until_success = until_success
        self._pause = pause
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name=f"keeper of {part.name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> Path:
        """What all its processes wrote, one after the other."""
        return self._process.log

    def running(self) -> bool:
        return self._process.ended is None

    def ready(self) -> bool:
        return self.running() and self.part.probe() is None

    def kill(self) -> None:
        """SIGKILL; it is started again shortly."""
        with self._lock, suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        with self._lock:
            self._process.signal(number)

    def end(self, grace: float) -> None:
        """SIGTERM, and SIGKILL `grace` seconds later; another one is started in its place."""
        with self._lock:
            process = self._process
            process.signal(signal.SIGTERM)
        end = time.monotonic() + grace
        while process.ended is None and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
        if process.ended is None:
            process.kill()
        while self._process is process and not self._stopping.is_set():
            time.sleep(_LOOK_SECONDS)

    def children(self) -> list[int]:
        return self._process.children()

    def stop(self, *, hurry: bool = False) -> None:
        """Start it no more, and end it: in good order, or at once."""
        self._stopping.set()
        self._thread.join()
        if hurry:
            self._process.kill()
        self._process.stop()

    def _start(self) -> Process:
        self.starts += 1
        return self._crew.start(self.part)

    def _keep(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            status = self._process.ended
            if status is None:
                continue
            if status == 0 and self._until_success:
                self.succeeded = True
                return
            if self._stopping.wait(self._pause):
                return
            with self._lock:
                self._process = self._start()
