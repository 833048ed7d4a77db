"""How much memory this process holds."""

from __future__ import annotations

import ctypes
import gc
import tracemalloc
from contextlib import suppress

import psutil


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def resident_bytes() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):  # what is free is given back, where this is glibc
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss
