"""Runs a command in a process group of its own, and kills that group when its caller ends.

The caller starts this file by its path and passes a pipe as standard input, to which it writes nothing. The pipe
closes when the engine closes it or when the engine's process ends. The command inherits the descriptors that the
caller passed on. This file imports only the standard library, so that it starts fast.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the command of the command line. Exits with its status, or 128 plus the signal that killed it."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    runner = os.getpid()

    def die_with_the_runner() -> None:
        # This covers a kill of the runner itself. It runs before any thread is started.
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != runner:
                os._exit(1)

    process = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        close_fds=False,
        process_group=0,
        preexec_fn=die_with_the_runner,
    )

    def end_the_group() -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1):
            pass
        end_the_group()

    threading.Thread(target=watch, daemon=True).start()
    # Kill the group before reaping the command: as a zombie it keeps the group's number, so no other process
    # can get it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    end_the_group()
    code = process.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
