"""For `make docs`: links that leave docs/, and files from other servers.

A link to a file outside docs/ is relative in the page, so it works where the repository is browsed. The built
pages hold no such file: there the link becomes its text and the file's path. A path without a file is a warning,
which ends a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_BESIDE = ("README.md", "CONTRIBUTING.md", "examples/sentiment/README.md", "k8s/README.md")
"""Pages outside docs/, whose links no build checks."""
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?:|#)([^)#\s]+)")
_UPWARDS = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
_LOADED_FROM_ELSEWHERE = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"'](?:https?:)?//[^\"']+"
)
_log = logging.getLogger("mkdocs.plugins.links")


def on_files(files: Any, **_: Any) -> Any:
    """Warn of links to nowhere in the pages outside docs/."""
    for page in _BESIDE:
        for path in _LINK.findall((ROOT / page).read_text("utf-8")):
            if not (ROOT / page).parent.joinpath(path).exists():
                _log.warning("%s links to %s, which does not exist", page, path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into the files' paths."""

    def path_of(match: re.Match[str]) -> str:
        text, link = match.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_path), link))
        if path.startswith("docs/"):
            return match.group()
        if not (ROOT / path).exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_path, link)
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return _UPWARDS.sub(path_of, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of a page that would load something from another server."""
    for found in _LOADED_FROM_ELSEWHERE.findall(output):
        _log.warning("%s loads a file from another server: %s", page.file.src_path, found)
    return output
