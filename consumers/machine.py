"""Ties a process to its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends (Linux). Gives whether the parent still lives."""
    if sys.platform != "linux":
        return True
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent
