"""Starts a part as a child that cannot outlive this process, and ends it with everything that it started."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from inferq.producer.up.orphan_reaper import GENTLE, MARK, kill_all
from inferq.producer.up.part import Part

LOG_BYTES = 50 * 1024 * 1024
"""A log larger than this many bytes is set aside."""

LINE = 400
"""Characters of a log line that are shown; Erlang writes very long ones."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def spawn(part: Part, log: Path, *, mark: str = "") -> subprocess.Popen[bytes]:
    """Start the part in a session of its own, with its output appended to `log` and its environment marked.

    When the calling *thread* ends, the kernel kills the part, or asks it to stop if it is gentle. So call it on a
    thread that lives as long as the part may. Raises OSError if the program cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    set_aside(log)
    parent = os.getpid()
    last_word = part.stop_signal if part.gentle else signal.SIGKILL

    def die_with_parent() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, last_word, 0, 0, 0)
            if os.getppid() != parent:  # it ended before the kernel was told
                os._exit(1)

    with log.open("ab") as output:
        return subprocess.Popen(
            part.argv,
            env={**part.env, MARK: mark + GENTLE if mark and part.gentle else mark},
            cwd=part.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def set_aside(log: Path) -> None:
    """If a log has grown too large, copy it to `NAME.log.1` and empty it.

    Lines that a part writes between the two steps are lost.
    """
    with suppress(OSError):  # not there yet, or no room for the copy: leave it
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_name(log.name + ".1"))
            os.truncate(log, 0)  # the part has it open for appending, and continues at its new end


def stop(process: subprocess.Popen[bytes], part: Part) -> None:
    """Ask the part to stop, wait for its grace, then kill it and everything left in its session."""
    if process.poll() is None:
        process.send_signal(part.stop_signal)
        try:
            process.wait(part.grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    kill_all({process.pid})


def last_lines(log: Path, count: int = 8) -> list[str]:
    """The last lines of a log without empty ones, each cut to a readable length."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
    return [line if len(line) <= LINE else line[: LINE - 3] + "..." for line in lines]
