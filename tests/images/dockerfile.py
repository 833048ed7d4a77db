"""What a Dockerfile of ours installs and starts."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Image:
    """An image's variant for the CPU: the arguments of each `pip install`, and the command that it starts.

    Of the command, `arguments` are what others may be given in the place of.
    """

    path: Path
    installs: tuple[tuple[str, ...], ...]
    entry_point: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: dict[str, str]

    @property
    def command(self) -> tuple[str, ...]:
        return self.entry_point + self.arguments

    @property
    def name(self) -> str:
        return self.path.parent.name


def dockerfiles() -> list[Path]:
    return sorted(ROOT.glob("*/*/Dockerfile"))


def read(path: Path) -> Image:
    """The image that a Dockerfile makes. Raises ValueError where it is not of our form."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    stages = {
        match[1]: match[2]
        for match in re.finditer(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.M | re.S)
    }
    build = stages.get("build-cpu", stages.get("build", ""))
    installs = tuple(tuple(shlex.split(found)) for found in re.findall(r"pip install ([^\n&]+)", build))
    entry = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    arguments = re.findall(r"^CMD (\[.*\])$", text, re.M)
    if not installs or len(entry) != 1 or len(arguments) > 1:
        raise ValueError(
            f"{path}: a `pip install` for the CPU, one ENTRYPOINT and at most one CMD are expected"
        )
    final = text.rpartition("\nFROM python")[2]
    environment = {
        name: value
        for line in re.findall(r"^ENV (.*)$", final.partition("FROM base AS gpu")[0], re.M)
        for name, _, value in (part.partition("=") for part in shlex.split(line))
        if name.startswith("INFERQ_")
    }
    return Image(
        path,
        installs,
        entry_point=tuple(json.loads(entry[0])),
        arguments=tuple(json.loads(arguments[0])) if arguments else (),
        environment=environment,
    )
