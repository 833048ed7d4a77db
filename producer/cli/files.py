"""Finds the files of a batch in folders and by globs, and uploads them."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from rich.progress import Progress, TextColumn, TimeElapsedColumn

from inferq.producer.cli.output import errors
from inferq.producer.client.errors import ApiError, InvalidRequest, Unauthorized
from inferq.producer.client.sync_client import Client
from inferq.schemas import InferqError, InvalidTask

_UPLOADS = 8
"""The most uploads at a time."""


def files_of(sources: Sequence[str], unread: set[Path]) -> Iterator[Path]:
    """The files of folders (with their subfolders) and globs; the files of each source are sorted by name.

    A file appears once, even if several links or sources lead to it. Unreadable folders are printed, and added
    to `unread`. Raises InvalidTask if a source matches nothing.
    """
    seen: set[str] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(_matches(path, ("**",), unread))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(_matches(Path(), path.parts, unread))
            if not found:
                raise InvalidTask(f"{source!r} matches no file or folder", code="input_not_found")
        for file in found:
            real = os.path.realpath(file)
            if real not in seen and _is_file(file):
                seen.add(real)
                yield file


def _matches(folder: Path, parts: Sequence[str], unread: set[Path]) -> Iterator[Path]:
    """The paths in a folder that match the parts of a glob.

    `**` follows no links; as the last part it matches everything below. The standard library's globs would skip
    unreadable folders silently.
    """
    part, *rest = parts
    if not glob.has_magic(part):
        if rest:
            yield from _matches(folder / part, rest, unread)
        elif os.path.lexists(folder / part):
            yield folder / part
        return
    deep = part == "**"
    if deep and rest:
        yield from _matches(folder, rest, unread)
    for entry in _entries(folder, unread):
        path = folder / entry.name
        if entry.name.startswith(".") and not part.startswith("."):
            continue
        if deep and entry.is_dir(follow_symlinks=False):
            yield from _matches(path, parts, unread)
        elif (deep and not rest) or (not deep and fnmatch(entry.name, part)):
            if rest:
                yield from _matches(path, rest, unread)
            else:
                yield path


def _entries(folder: Path, unread: set[Path]) -> Sequence[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):  # a glob's first parts may match a file
        return []
    except OSError as error:
        if folder not in unread:
            unread.add(folder)
            _print_skipped(folder, error.strerror or str(error))
        return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its upload gives the reason
        return True


def uploaded(client: Client, first: Path, rest: Iterator[Path]) -> Iterator[tuple[Path, str | None]]:
    """Upload files, `_UPLOADS` at a time; gives each file with its URL, in order.

    A file that cannot be uploaded is printed, and its URL is None.
    """

    def begin(path: Path) -> tuple[Path, Future[str]]:
        return path, threads.submit(_upload, client, path)

    with (
        ThreadPoolExecutor(_UPLOADS) as threads,
        Progress(
            TextColumn("uploading"), TextColumn("{task.completed:.0f} files"), TimeElapsedColumn(),
            console=errors, transient=True, disable=not errors.is_terminal,
        ) as bars,
    ):  # fmt: skip
        bar = bars.add_task("", total=None)
        waiting = deque([begin(first)])
        for path in rest:
            waiting.append(begin(path))
            if len(waiting) > 2 * _UPLOADS:
                yield _url_of(*waiting.popleft())
                bars.advance(bar)
        while waiting:
            yield _url_of(*waiting.popleft())
            bars.advance(bar)


def _upload(client: Client, path: Path) -> str:
    if path.stat().st_size == 0:
        raise InvalidTask("the file is empty")
    return client.upload(path)


def _url_of(path: Path, uploading: Future[str]) -> tuple[Path, str | None]:
    """The file with its URL; None if the file is at fault. Other faults are raised: they concern all files."""
    try:
        return path, uploading.result()
    except (InvalidRequest, InvalidTask) as error:
        reason = error.message
    except OSError as error:
        reason = error.strerror or str(error)
    except Unauthorized:
        raise  # it concerns all files
    except ApiError as error:
        raise InferqError(f"{path}: {error.message}", code=error.code) from error
    _print_skipped(path, reason)
    return path, None


def _print_skipped(path: Path, reason: str) -> None:
    errors.print(f"skipped {path}: {reason}", soft_wrap=True)
