"""Which files a piece of code made and left."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from typing import Any


@contextmanager
def files_left(parent: Path) -> Iterator[list[str]]:
    """Gives a list that holds, once the block has ended, the files that it made and left.

    Temporary and working folder are the block's own; elsewhere, files are noticed as Python opens them.
    """
    left: list[str] = []
    with tempfile.TemporaryDirectory(prefix="inferq-contract-", dir=parent) as folder:
        temporary, working = Path(folder, "temporary"), Path(folder, "working")
        temporary.mkdir()
        working.mkdir()
        made = _made_files()
        tempdir, variable = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
        made.paths, made.watching = set(), True
        try:
            with chdir(working):
                yield left
        finally:
            made.watching, tempfile.tempdir = False, tempdir
            del os.environ["TMPDIR"]
            if variable is not None:
                os.environ["TMPDIR"] = variable
        left += [f"{path.name} in the temporary folder" for path in temporary.iterdir()]
        left += [f"{path.name} in the working folder" for path in working.iterdir()]
        left += sorted(p for p in made.paths if os.path.lexists(p) and not p.startswith(folder))


class _MadeFiles:
    """Notes, while it watches, each path where there was nothing and that is opened for writing, or made."""

    def __init__(self) -> None:
        self.watching = False
        self.paths: set[str] = set()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching or event not in {"open", "os.mkdir"}:
            return
        path = arguments[0]
        writes = event == "os.mkdir" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, str | bytes) and not os.path.lexists(path):
            self.paths.add(str(Path(os.fsdecode(path)).absolute()))


@cache
def _made_files() -> _MadeFiles:
    # An audit hook cannot be taken out again, so there is one, which mostly looks away.
    return _MadeFiles()
