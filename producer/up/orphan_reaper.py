"""A process that outlives a killed supervisor of `inferq up` and ends everything that it left behind.

It reads lines on its standard input: `+SESSION` for a part that was started, `~SESSION` for a gentle one, and
`-SESSION` for one that ended. When its input ends, it kills everything in those sessions and every process with
the supervisor's mark in its environment. Gentle parts are asked to stop first, and have GRACE seconds. The
kernel's parent-death signal reaches only the parts themselves; this reaches their children, too.

It runs as a plain script, on the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

MARK = "INFERQ_UP_MARK"
"""The environment variable whose value marks the processes of one supervisor."""

GENTLE = "-gentle"
"""The suffix of a gentle part's mark."""

GRACE = 30.0

_MEMORY, _ENVIRONMENT_END = 20, 48
"""Where `_stat` has the size of the memory, and the address at which the environment ends."""


def members(sessions: Collection[int], mark: str) -> list[int]:
    """The pids of all living processes in these sessions, or with this mark in their environment."""
    needle = f"{MARK}={mark}".encode() if mark else b""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, session = _status(entry)
            if state in "ZX":
                continue
            # Another user's environment cannot be read, but another user's processes are not ours either.
            if session in sessions or (needle and needle in environment(entry).split(b"\0")):
                found.append(pid)
    return found


def alive(pid: int) -> bool:
    """Whether that process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return _status(Path("/proc") / str(pid))[0] not in "ZX"
    return False


def environment(entry: Path, *, seconds: float = 5.0) -> bytes:
    """The environment of a process. Waits, at most `seconds`, while the process is between two programs.

    For a moment within execve(2) a process has no environment at all, and would be taken for somebody else's.
    """
    end = time.monotonic() + seconds
    while not (found := (entry / "environ").read_bytes()):
        stat = _stat(entry)
        if int(stat[_MEMORY]) == 0 or int(stat[_ENVIRONMENT_END]) != 0 or time.monotonic() > end:
            break  # it is the kernel's, its environment is empty, or it may not be looked into
        time.sleep(0.002)
    return found


def _status(entry: Path) -> tuple[str, int]:
    """A process's state and session id."""
    fields = _stat(entry)
    return fields[0], int(fields[3])


def _stat(entry: Path) -> list[str]:
    """What proc(5) says of a process, from its state on."""
    # The command's name, in parentheses, may hold any character.
    return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()


def kill_all(sessions: Collection[int], mark: str = "", *, seconds: float = 10.0) -> bool:
    """Kill every member, also those that appear meanwhile. Gives whether none is left in time."""
    end = time.monotonic() + seconds
    while found := members(sessions, mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return 0 if reap(sys.stdin, sys.argv[1]) else 1


def reap(orders: Iterable[str], mark: str, *, grace: float = GRACE) -> bool:
    """Once the orders end, end what they named; gives whether nothing of it is left.

    An order is `+`, `~` (a gentle part, which has `grace` seconds to stop by itself) or `-` (taken back), and
    the number of a session.
    """
    hard: set[int] = set()
    gentle: set[int] = set()
    for line in orders:
        session = int(line[1:])
        hard.discard(session)
        gentle.discard(session)
        if line.startswith("+"):
            hard.add(session)
        elif line.startswith("~"):
            gentle.add(session)
    gone = kill_all(hard, mark)
    end = time.monotonic() + grace
    # The part itself leads its session. One that was still starting may have lost the first signal.
    ticks = 0
    while (waiting := [session for session in gentle if alive(session)]) and time.monotonic() < end:
        if ticks % 20 == 0:
            for session in waiting:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(session, signal.SIGTERM)
        ticks += 1
        time.sleep(0.05)
    return kill_all(gentle, mark + GENTLE) and gone


if __name__ == "__main__":
    sys.exit(main())
