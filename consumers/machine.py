"""The memory of this machine, or of the container that this process runs in; and the end of its processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where cgroups of version 2 and 1 have a container's limit."""


def total_memory(limits: Sequence[Path] = CGROUP_LIMITS) -> int:
    """The bytes of memory that this process can have at most: the machine's, or fewer in a container."""
    total: int = psutil.virtual_memory().total
    for path in limits:
        with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
            total = min(total, int(path.read_text()))
    return total


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends (Linux). Gives whether the parent still lives."""
    if sys.platform != "linux":
        return True
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent
