"""Being run soon after waking up, where others compute on the same machine."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_SLICE_NS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The number of the system call: neither Python nor Debian 12's libc has a function for it."""
_ATTR = struct.Struct("IIQiIQQQ")
"""`struct sched_attr`: size, policy, flags, nice, priority, runtime (the slice, in ns), deadline, period."""


def ask_for_short_slices() -> bool:
    """Ask Linux for short time slices for this thread and those that it starts; whether it heard.

    From 6.12 on, who asks for less at a time is served sooner; older kernels change nothing. An answer takes
    several wake-ups, and on a busy machine each may wait for whole slices of whatever computes there.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0)
