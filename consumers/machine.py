"""The memory of this machine, or of the container that this process runs in."""

from __future__ import annotations

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
