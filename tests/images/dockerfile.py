"""What the images of the Dockerfile hold and start, read without building them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
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

    @property
    def runs(self) -> tuple[str, ...]:
        """The commands of its RUN instructions."""
        return tuple(arguments for word, arguments in self.instructions if word == "RUN")

    @property
    def environment(self) -> dict[str, str]:
        """What its own ENV instructions set."""
        return _environment(self.instructions)


@dataclass(frozen=True)
class Image:
    """A target's finished image.

    `history` holds the instructions of its stage and of those below it, the lowest first. `builds` holds the RUN
    commands of the stage that installs inferq for it into /opt/inferq.
    """

    target: str
    history: tuple[tuple[str, str], ...]
    builds: tuple[str, ...]

    def last(self, keyword: str) -> str:
        """The arguments of the instruction that counts; empty if the image has none."""
        return next((arguments for word, arguments in reversed(self.history) if word == keyword), "")

    def values(self, keyword: str) -> list[str]:
        """The members of all JSON lists that follow the keyword."""
        return [
            value for word, arguments in self.history if word == keyword for value in json.loads(arguments)
        ]

    @property
    def installs(self) -> tuple[tuple[str, ...], ...]:
        """The arguments of each `pip install` of its environment."""
        found = re.findall(r"\bpip install ([^&]+)", " && ".join(self.builds))
        return tuple(tuple(shlex.split(install)) for install in found)

    @property
    def packages(self) -> frozenset[str]:
        """The Debian packages that it installs."""
        found = re.findall(
            r"apt-get install ([^&]+)", " && ".join(text for word, text in self.history if word == "RUN")
        )
        return frozenset(
            word for install in found for word in shlex.split(install) if not word.startswith("-")
        )

    @property
    def entry_point(self) -> tuple[str, ...]:
        return tuple(json.loads(self.last("ENTRYPOINT")))

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the entry point, unless the container is started with arguments of its own."""
        return tuple(json.loads(self.last("CMD") or "[]"))

    @property
    def environment(self) -> dict[str, str]:
        return _environment(self.history)


def stages() -> dict[str, Stage]:
    """The stages by name, in the file's order."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for word, arguments in _instructions():
        if word == "FROM":
            parent, _, name = arguments.partition(" AS ")
            found[name] = (parent, current := [])
        else:
            current.append((word, arguments))
    return {name: Stage(name, parent, tuple(steps)) for name, (parent, steps) in found.items()}


def build_arguments() -> dict[str, str]:
    """The build arguments with their defaults, which are empty for those without one."""
    pairs = [arguments.partition("=") for word, arguments in _instructions() if word == "ARG"]
    return {name: default for name, _, default in pairs}


def images() -> list[Image]:
    """Every target that starts something, by name."""
    known = stages()
    finished = (
        name for name, stage in known.items() if any(w == "ENTRYPOINT" for w, _ in stage.instructions)
    )
    return [
        Image(name, tuple(_history(name, known)), known[f"build-{name}"].runs) for name in sorted(finished)
    ]


def _environment(instructions: Iterable[tuple[str, str]]) -> dict[str, str]:
    pairs = (part for word, arguments in instructions if word == "ENV" for part in shlex.split(arguments))
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


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
