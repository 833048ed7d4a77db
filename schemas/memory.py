"""The memory of this machine, or of the container that this process runs in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where cgroups of version 2 and 1 have a container's limit."""


def total_memory(limits: Sequence[Path] | None = None) -> int:
    """The bytes of memory that this process can have at most: the machine's, or fewer in a container.

    `limits` defaults to CGROUP_LIMITS.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CGROUP_LIMITS if limits is None else limits:
        with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
            total = min(total, int(path.read_text()))
    return total
