"""Lua scripts for Redis: files beside the code that calls them, put together from pieces that they share."""

from __future__ import annotations

from pathlib import Path

_WRITABLE = Path(__file__).parent / "writable"


def read_lua(*files: Path) -> str:
    """One script's source: the files one after the other, so that a later one may use what an earlier defines.

    Every script, also one that only reads, begins with a write. A Redis that refuses writes, such as a former
    master, may be out of date: that it does not know a task says nothing.
    """
    return "\n".join(file.with_suffix(".lua").read_text("utf-8") for file in (_WRITABLE, *files))
