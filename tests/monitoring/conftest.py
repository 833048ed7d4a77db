"""promtool, as `make prometheus` unpacks it from Debian's package."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from inferq.producer.up.part import find_program
from k8s.monitoring.observe import UNPACKED


@pytest.fixture
def promtool() -> Callable[..., str]:
    """Run promtool and give what it prints; fails if promtool does."""
    program = find_program("promtool", [UNPACKED / "usr/bin"])
    if program is None:
        pytest.skip("promtool is neither on PATH nor in .make/prometheus; `make prometheus` fetches it")

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
