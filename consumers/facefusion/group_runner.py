"""Runs a command in a process group of its own, and ends that group when whoever asked for it is gone.

It is started by its path, with a pipe as standard input that nobody writes to: the pipe ends when its other
end is closed, by the engine or with the engine's process, however that ends. Standard library only, so that
it starts at once.
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
    """Run the command line's command. Exits with its status, or 128 and the signal that ended it."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    runner = os.getpid()

    def die_with_the_warden() -> None:
        # For the case that the runner itself is killed; no thread has been started when this runs.
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != runner:
                os._exit(1)

    process = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0, preexec_fn=die_with_the_warden
    )

    def end_the_group() -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1):
            pass
        end_the_group()

    threading.Thread(target=watch, daemon=True).start()
    # The command is left as a zombie until what it started is gone too: so its group's number is not taken
    # by another in between.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    end_the_group()
    code = process.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
