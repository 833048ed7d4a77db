from __future__ import annotations

import ctypes
import os
import platform
import threading

import pytest

from producer.gateway.slices import _ATTR, ask_for_short_slices

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


@pytest.mark.skipif(platform.machine() not in _SCHED_GETATTR, reason="no number of the system call")
@pytest.mark.skipif(
    tuple(int(part) for part in platform.release().split(".")[:2]) < (6, 12), reason="Linux before 6.12"
)
def test_the_thread_has_a_short_slice_and_keeps_its_niceness() -> None:
    found: list[tuple[int, ...]] = []

    def look() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
        assert ask_for_short_slices()
        about = ctypes.create_string_buffer(_ATTR.size)
        call = _SCHED_GETATTR[platform.machine()]
        assert ctypes.CDLL(None).syscall(call, 0, about, _ATTR.size, 0) == 0
        found.append(_ATTR.unpack(about.raw))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    ((_, policy, _, nice, _, runtime, _, _),) = found
    assert (policy, nice, runtime) == (os.SCHED_OTHER, 3, 100_000)
