"""Some init scripts close the standard streams of what they start."""

from __future__ import annotations

import subprocess
import sys

import pytest

_STREAMS = """
import os, socket
from inferq.standard_streams import open_standard_streams
open_standard_streams()
listener = socket.socket()
print("lost"), os.write(1, b"lost"), os.write(2, b"lost"), os.read(0, 1)
import sys
assert sys.stdin and sys.stdout and sys.stderr, "a stream is missing"
sys.exit(0 if listener.fileno() > 2 else 3)
"""
_ENGINE = """
from inferq.consumers.runtime.process import EngineProcess
engine = EngineProcess("echo")
engine.spawn()
engine.wait_ready(limit=60)
engine.close()
"""


@pytest.mark.parametrize(
    ("program", "closed"),
    [(_STREAMS, "2>&-"), (_STREAMS, "<&- >&- 2>&-"), (_ENGINE, "2>&-")],
    ids=["error", "all", "engine"],
)
def test_closed_standard_streams_change_nothing(program: str, closed: str) -> None:
    command = ["sh", "-c", f'exec "$0" -P -c "$1" {closed}', sys.executable, program]
    assert subprocess.run(command, timeout=60, check=False, stdin=subprocess.DEVNULL).returncode == 0
