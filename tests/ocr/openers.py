"""Documents that behave badly in the process that decodes them. A file's text says how."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Bad:
    """Page 2 does what the file says; the others have one grey pixel of their number."""

    page_count = 3

    def __init__(self, path: Path) -> None:
        self._deed = path.read_text()

    def page(self, number: int) -> NDArray[np.uint8]:
        if number == 2:
            getattr(self, self._deed)()
        return np.full((1, 1, 3), number, np.uint8)

    def hang(self) -> None:
        while True:
            pass

    def eat(self) -> None:
        np.ones(1 << 32, np.uint8)

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def vanish(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise SystemExit

    def close(self) -> None:
        pass
