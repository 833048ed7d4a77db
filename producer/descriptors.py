"""The limit of open files of a process."""

from __future__ import annotations

import resource

_MOST = 65536


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files as far as that is allowed and useful; gives the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MOST if soft == resource.RLIM_INFINITY else soft
