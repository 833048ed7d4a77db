"""What the images of the Dockerfile hold and start, read without building them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


@dataclass(frozen=True)
class Stage:
    """A stage: the stage or registry image that it starts from, and its instructions as (keyword, arguments)."""

    name: str
    parent: str
    instructions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Image:
    """A target's finished image.

    `history` holds the instructions of its stage and of those below it, the lowest first. `installs` holds the
    arguments of each `pip install` in the build stage whose environment it copies.
    """

    target: str
    history: tuple[tuple[str, str], ...]
    installs: tuple[tuple[str, ...], ...]

    def last(self, keyword: str) -> str:
        """The arguments of the instruction that counts; empty if the image has none."""
        return next((arguments for word, arguments in reversed(self.history) if word == keyword), "")

    def values(self, keyword: str) -> list[str]:
        """The members of all JSON lists that follow the keyword."""
        return [
            value for word, arguments in self.history if word == keyword for value in json.loads(arguments)
        ]

    @property
    def entry_point(self) -> tuple[str, ...]:
        return tuple(json.loads(self.last("ENTRYPOINT")))

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the entry point, unless the container is started with arguments of its own."""
        return tuple(json.loads(self.last("CMD") or "[]"))

    @property
    def environment(self) -> dict[str, str]:
        pairs = (part for word, arguments in self.history if word == "ENV" for part in shlex.split(arguments))
        return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def stages() -> dict[str, Stage]:
    """The stages by name, in the file's order."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, arguments in _instructions():
        if word == "FROM":
            parent, _, name = arguments.partition(" AS ")
            found[name] = (parent, current := [])
        else:
            current.append((word, arguments))
    return {name: Stage(name, parent, tuple(steps)) for name, (parent, steps) in found.items()}


def images() -> list[Image]:
    """Every target that starts something, by name."""
    known = stages()
    finished = (
        name for name, stage in known.items() if any(w == "ENTRYPOINT" for w, _ in stage.instructions)
    )
    return [_image(name, known) for name in sorted(finished)]


def _image(target: str, known: dict[str, Stage]) -> Image:
    history = _history(target, known)
    sources = re.findall(
        r"--from=(\S+)", " ".join(arguments for word, arguments in history if word == "COPY")
    )
    runs = [arguments for source in sources for word, arguments in _history(source, known) if word == "RUN"]
    installs = re.findall(r"pip install ([^&]+)", " && ".join(runs))
    return Image(target, tuple(history), tuple(tuple(shlex.split(install)) for install in installs))


def _history(name: str, known: dict[str, Stage]) -> list[tuple[str, str]]:
    if name not in known:
        return []
    stage = known[name]
    return [*_history(stage.parent, known), *stage.instructions]


def _instructions() -> Iterator[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.M)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, arguments = line.partition(" ")
            yield word, " ".join(arguments.split()) if word == "FROM" else arguments.strip()
