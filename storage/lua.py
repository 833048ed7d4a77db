"""Lua scripts for Redis: files beside the code that calls them, put together from pieces that they share."""

from __future__ import annotations

from pathlib import Path


def read_lua(*files: Path) -> str:
    """One script's source: the files one after the other, so that a later one may use what an earlier defines."""
    return "\n".join(file.with_suffix(".lua").read_text("utf-8") for file in files)
