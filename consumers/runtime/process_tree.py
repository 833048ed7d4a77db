"""Ends engine processes with everything that they started, and reaps what they leave behind.

An engine process adopts the orphans among its descendants, so a daemon stays in its tree for as long as it lives.
The worker adopts those of an engine that has ended. So every child of a worker that the worker did not start is
left over from an engine: it is killed and reaped. As PID 1 of a container a worker adopts all orphans anyway.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_FREEZE_SECONDS = 2.0
_LOOK_SECONDS = 0.01

_lock = threading.Lock()
_started: set[int] = set()
_adopting = False


def adopt_descendants() -> None:
    """Have the kernel make orphaned descendants of this process its children (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """Make this process the one that kills and reaps what engines leave behind.

    Only for a process whose children are engine processes: `end_orphans` kills all others.
    """
    global _adopting
    adopt_descendants()
    _adopting = sys.platform == "linux"


def start_engine(command: Sequence[str], *, pass_fds: Sequence[int], output: int) -> subprocess.Popen[bytes]:
    """Start an engine process, as the leader of its own process group. It prints to the descriptor `output`."""
    with _lock:
        process = subprocess.Popen(
            command,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )
        _started.add(process.pid)
        return process


def kill_engine(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill an engine process and all its descendants. Gives whether it is gone within `seconds`."""
    kill_tree(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # those of a process that ended by itself
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    with _lock:
        _started.discard(process.pid)
    end_orphans()
    return True


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants, also those that are started meanwhile."""
    frozen: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + _FREEZE_SECONDS
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        while time.monotonic() < deadline:
            # A stopped process starts no other, so the tree is complete once a look finds nothing new.
            found = {each.pid: each for each in (root, *root.children(recursive=True))}
            new = [each for each in found.values() if each.pid not in frozen]
            if not new:
                break
            for each in new:
                frozen[each.pid] = each
                with suppress(psutil.Error):
                    each.suspend()
    for each in reversed(frozen.values()):
        with suppress(psutil.Error):
            each.kill()


def end_orphans(seconds: float = 1.0) -> None:
    """Kill and reap what ended engines left behind, within `seconds`. Does nothing without `adopt_orphans`."""
    if not _adopting:
        return
    deadline = time.monotonic() + seconds
    while _end_orphans() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _end_orphans() -> bool:
    """Whether there were any."""
    found = False
    with _lock:  # so that an engine that is being started is known
        for child in psutil.Process().children():
            # A program that a library of the worker's own runs is in the worker's process group.
            with suppress(OSError):
                if child.pid in _started or os.getpgid(child.pid) == os.getpgrp():
                    continue
                found = True
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, os.WNOHANG)
    return found
