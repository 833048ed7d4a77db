"""The Lua scripts of batches, and their data in Redis: kilobytes for a million tasks.

A batch is a hash under `inferq:batch:<tenant>:<batch>`:
    open whether its bitmaps are correct; the feeder sets it
    n no line after this one is fed    l o the last processed line, and where it ends (bytes)
    t total lines    s state    e why it failed    x cancel flag    x:<line> cancel flag of one line
    q `<ended> <since> <asked>`, a stall: since when no task has ended    fa its `fed_again`
    chain slice the current feeding
    then before the two latest samples of `<microseconds> <ended>`, for the rate
and a bitmap per state, `inferq:bits:<state>:<tenant>:<batch>` with the states fed, succeeded, failed,
cancelled, invalid and cached; a line's bit is its number minus one. `inferq:lease:<tenant>:<batch>` names its feeder.
"""

from __future__ import annotations

from pathlib import Path

from inferq.storage.lua import read_lua
from inferq.storage.status.scripts import BATCH_LINES

_HERE = Path(__file__).parent
_HEAD = (_HERE / "arguments", BATCH_LINES, _HERE / "keys")
_RUNS = _HERE / "runs"
_COUNTS = _HERE / "counts"

SOURCES = {
    "take": read_lua(*_HEAD, _HERE / "take"),
    "release": read_lua(*_HEAD, _HERE / "release"),
    "open": read_lua(*_HEAD, _HERE / "open"),
    "step": read_lua(*_HEAD, _COUNTS, _RUNS, _HERE / "step"),
    "ends": read_lua(*_HEAD, _HERE / "ends"),
    "mark": read_lua(*_HEAD, _RUNS, _HERE / "mark"),
    "look": read_lua(*_HEAD, _COUNTS, _HERE / "look"),
    "processed": read_lua(*_HEAD, _HERE / "processed"),
    "unended": read_lua(*_HEAD, _HERE / "unended"),
    "forget": read_lua(*_HEAD, _HERE / "forget"),
}
"""Each script by its name."""
