"""The machine: processes that end with their parent, and GPUs."""

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


def gpu_fault(number: int) -> str | None:
    """Why CUDA cannot use the GPU with this number; None if it can. Takes no memory of the GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no GPU here: the NVIDIA driver's libcuda.so.1 is missing"
    if code := driver.cuInit(0):
        name = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(name))
        said = name.value.decode() if name.value else f"error {code}"
        return f"there is no GPU here: the NVIDIA driver answers {said}"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if number < count.value:
        return None
    return f"there is no GPU {number} here: the NVIDIA driver has {count.value}, numbered from 0"


def gpu_memory_bytes(number: int) -> int:
    """The memory of the GPU with this number, or of the part of it that CUDA sees here. See `gpu_fault` first."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, size = ctypes.c_int(), ctypes.c_size_t()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), number)
    if code := driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
        raise OSError(f"the NVIDIA driver does not say how much memory GPU {number} has: error {code}")
    return size.value
