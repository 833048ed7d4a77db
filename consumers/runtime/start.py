"""Starts engine processes. It imports little, so that the first one loads while the worker itself is still starting.

`start_ahead` starts a process; the next `start` of the type takes it over instead of starting another one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass

from inferq.consumers.runtime.process_tree import start_engine


@dataclass(frozen=True)
class StartedEngine:
    """An engine process that loads: the process, the worker's end of its channel, and both ends of its output."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    output: tuple[int, int]


_ahead: dict[str, StartedEngine] = {}


def start_ahead(type_name: str) -> None:
    """Start a process that the next `start` of the type takes over. For the main thread, since it ends with its thread.

    If the machine cannot start it now, `start` says so.
    """
    with suppress(OSError):
        _ahead[type_name] = _start(type_name)


def start(type_name: str) -> StartedEngine:
    """The process that was started ahead, or a new one. Raises OSError if the machine cannot start it."""
    return _ahead.pop(type_name, None) or _start(type_name)


def _start(type_name: str) -> StartedEngine:
    near, far = socket.socketpair()
    output = os.pipe()
    command = [sys.executable, "-P", "-m", "inferq.consumers.runtime.child", type_name]
    try:
        with far:
            process = start_engine(
                [*command, str(far.fileno()), str(os.getpid())], pass_fds=[far.fileno()], output=output[1]
            )
    except BaseException:
        near.close()
        for end in output:
            os.close(end)
        raise
    return StartedEngine(process, near, output)
