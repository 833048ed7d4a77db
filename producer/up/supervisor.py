"""Starts the parts, restarts those that end, and stops them: one task per part on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from inferq.producer.up import orphan_reaper
from inferq.producer.up.part import Part
from inferq.producer.up.process import last_lines, set_aside, spawn
from inferq.schemas import InferqError
from inferq.schemas.errors import EXIT_CONFIG

LOG_LOOK_SECONDS = 60.0

Stage = Literal["starting", "ready", "late", "ended", "failing", "left out", "stopping"]


@dataclass(frozen=True)
class Backoff:
    """Seconds before a part that ended is started again: doubling from `first` to `most`.

    It starts over once the part has worked for `steady` seconds, counted from when it was ready. After `patience`
    ends in a row the part counts as failing.
    """

    first: float = 0.5
    most: float = 30.0
    steady: float = 10.0
    patience: int = 3

    def delay(self, ends: int) -> float:
        return float(min(self.first * 2 ** min(ends - 1, 32), self.most))


@dataclass(frozen=True)
class Report:
    """What happened to a part. `seconds` since it was started, or until it is started again."""

    part: str
    stage: Stage
    text: str = ""
    seconds: float = 0.0


class PartFailed(InferqError):
    """A part did not become ready when everything was started."""

    code = "part_failed"


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    ended: asyncio.Event
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs `parts` until `request_stop`; nothing that they started outlives it.

    `request_stop` stops the parts in order; a second call stops them at once. Call it and `run` on the main
    thread. `mark` marks this supervisor's processes, see `inferq.producer.up.orphan_reaper`. `held` is a
    descriptor that stays open until the last of them has ended.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        logs: Path,
        *,
        mark: str,
        report: Callable[[Report], None],
        held: int | None = None,
        backoff: Backoff = Backoff(),
    ) -> None:
        self._parts = {part.name: part for part in parts}
        self._logs = logs
        self._mark = mark
        self._report = report
        self._held = held
        self._backoff = backoff
        self._running: dict[str, _Running] = {}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.left_out: list[str] = []
        """The optional parts that do not run because something is not installed, by name."""
        self.late: list[str] = []
        """The optional parts that are not ready yet and did not delay the others, by name."""

    def request_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def run(self, when_ready: Callable[[], None]) -> None:
        """Start everything, call `when_ready`, and return once all has been stopped.

        Raises PartFailed if a part does not become ready, or none of the optional ones; everything has stopped then.
        It does not wait for an optional part that is `late`, which is still retried, or that is `left_out`.
        `when_ready` is not called if a stop was requested first.
        """
        self._reaper = _start_reaper(self._mark, self._held)
        self._ready = {name: asyncio.Event() for name in self._parts}
        keepers = [asyncio.create_task(self._keep(part)) for part in self._parts.values()]
        stop = asyncio.create_task(self._stop.wait())
        ready = asyncio.create_task(self._all_ready())
        logs = asyncio.create_task(self._look_after_logs())
        try:
            await asyncio.wait([*keepers, stop, ready], return_when=asyncio.FIRST_COMPLETED)
            if not stop.done() and ready.done():
                when_ready()
                await asyncio.wait([*keepers, stop], return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                if keeper.done():
                    keeper.result()
        finally:
            self._stop.set()
            tasks = (*keepers, stop, ready, logs)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_all()
            await asyncio.to_thread(_end_reaper, self._reaper)

    async def _all_ready(self) -> None:
        for event in self._ready.values():
            await event.wait()

    async def _look_after_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_LOOK_SECONDS)
            for part in self._parts.values():
                set_aside(self._log(part))  # on this thread, so that the part cannot start meanwhile

    async def _keep(self, part: Part) -> None:
        for name in part.needs:
            if name in self._ready:
                await self._ready[name].wait()
        ends = 0
        while True:
            reason, worked = await self._live(part)
            hopeless = part.optional and self._exit_code(part) == EXIT_CONFIG
            if part.name in self._running and (part.optional or self._ready[part.name].is_set()):
                await self._end(part.name)
            first = not self._ready[part.name].is_set()
            if first and not self._is_dispensable(part):
                raise PartFailed(f"{part.name} {reason}\n{self._excerpt(part)}")
            if hopeless and (first or part.name in self.late):
                self._give_up(part, reason)
                await self._stop.wait()
                return
            ends = 1 if worked > self._backoff.steady else ends + 1
            delay = self._backoff.delay(ends)
            if first:
                self._go_on_without(part, reason)
            elif ends < self._backoff.patience:
                self._report(Report(part.name, "ended", reason, delay))
            elif ends == self._backoff.patience:
                self._report(Report(part.name, "failing", f"{reason}\n{self._excerpt(part)}", delay))
            await asyncio.sleep(delay)

    def _is_dispensable(self, part: Part) -> bool:
        optional = {name for name, each in self._parts.items() if each.optional}
        return part.optional and bool(optional - {part.name, *self.left_out, *self.late})

    def _give_up(self, part: Part, reason: str) -> None:
        self.late = [name for name in self.late if name != part.name]
        self.left_out.append(part.name)
        self._report(Report(part.name, "left out", f"{reason}\n{self._excerpt(part)}"))
        self._ready[part.name].set()

    def _go_on_without(self, part: Part, reason: str) -> None:
        """Let the others be ready while this part, which may be loading a model, is still tried."""
        self.late.append(part.name)
        self._report(Report(part.name, "late", f"{reason}\n{self._excerpt(part)}"))
        self._ready[part.name].set()

    def _exit_code(self, part: Part) -> int | None:
        running = self._running.get(part.name)
        return running.process.returncode if running is not None and running.ended.is_set() else None

    async def _live(self, part: Part) -> tuple[str, float]:
        """Run a part once, until its process ends or does not become ready in time.

        Gives the reason, and for how many seconds it was ready. An optional part that starts late has no time limit:
        a worker itself restarts an engine that does not load.
        """
        try:
            running = self._start(part)
        except OSError as error:
            return f"cannot be started: {error}", 0
        self._report(Report(part.name, "starting"))
        end = running.since + part.start_limit
        while (reason := await asyncio.to_thread(part.probe)) is not None or running.ended.is_set():
            if running.ended.is_set():
                return _how_it_ended(running.process), 0
            if time.monotonic() > end and part.name not in self.late:
                late = f"was not ready within {part.start_limit:.0f} s ({reason})"
                if self._ready[part.name].is_set() or not self._is_dispensable(part):
                    return late, 0
                self._go_on_without(part, late)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(running.ended.wait(), 0.1)
        self._ready[part.name].set()
        self.late = [name for name in self.late if name != part.name]
        ready_since = time.monotonic()
        self._report(Report(part.name, "ready", seconds=ready_since - running.since))
        await running.ended.wait()
        return _how_it_ended(running.process), time.monotonic() - ready_since

    def _start(self, part: Part) -> _Running:
        # No await between the start and the entry: a stop finds either neither or both.
        process = spawn(part, self._log(part), mark=self._mark)
        running = _Running(part, process, asyncio.Event())
        self._running[part.name] = running
        self._tell_reaper(f"{'~' if part.gentle else '+'}{process.pid}\n")
        loop = asyncio.get_running_loop()

        def wait() -> None:
            process.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(running.ended.set)

        threading.Thread(target=wait, name=f"wait-{part.name}", daemon=True).start()
        return running

    async def _end_all(self) -> None:
        ranks = sorted({running.part.stop_rank for running in self._running.values()})
        for rank in ranks:
            names = [name for name, running in self._running.items() if running.part.stop_rank == rank]
            await asyncio.gather(*(self._end(name) for name in names))

    async def _end(self, name: str) -> None:
        """End a part's process, and then everything left in its session."""
        running = self._running[name]
        if not running.ended.is_set():
            self._report(Report(name, "stopping"))
            await self._ask_to_stop(running)
            running.process.kill()
            await running.ended.wait()
        await asyncio.to_thread(orphan_reaper.kill_all, {running.process.pid})
        self._tell_reaper(f"-{running.process.pid}\n")
        del self._running[name]

    async def _ask_to_stop(self, running: _Running) -> None:
        # A program that is still starting may lose a signal (Erlang's does): ask it again.
        again = None if self._ready[running.part.name].is_set() else 1.0
        waits = [asyncio.create_task(event.wait()) for event in (running.ended, self._hurry)]
        end = time.monotonic() + running.part.grace
        while (left := end - time.monotonic()) > 0:
            running.process.send_signal(running.part.stop_signal)
            done, _ = await asyncio.wait(
                waits, timeout=min(left, again or left), return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                break
        for wait in waits:
            wait.cancel()

    def _tell_reaper(self, line: str) -> None:
        # Without its orphan reaper the supervisor still ends everything, unless it is killed itself.
        with contextlib.suppress(OSError, ValueError):
            if self._reaper.stdin is not None:
                self._reaper.stdin.write(line.encode())
                self._reaper.stdin.flush()

    def _log(self, part: Part) -> Path:
        return self._logs / f"{part.name}.log"

    def _excerpt(self, part: Part) -> str:
        lines = last_lines(self._log(part))
        return "\n".join([*(f"    {line}" for line in lines), f"    (from {self._log(part)})"])


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _start_reaper(mark: str, held: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(orphan_reaper.__file__)), mark],
        stdin=subprocess.PIPE,
        # It must not hold our output open.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=() if held is None else (held,),
        env={name: value for name, value in os.environ.items() if name != orphan_reaper.MARK},
    )


def _end_reaper(process: subprocess.Popen[bytes]) -> None:
    # Its input ends; it checks once more, and ends.
    try:
        process.communicate(timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
