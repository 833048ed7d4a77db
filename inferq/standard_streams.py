"""The standard streams of a process, some of which its parent may have closed."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def open_standard_streams() -> None:
    """Open those of file descriptors 0, 1 and 2 that are closed, on the null device.

    Otherwise a connection or a file of ours would get their numbers, and what is printed would be written into it.
    Call this before anything else is opened.
    """
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        else:
            os.set_inheritable(number, True)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for as long as the process
