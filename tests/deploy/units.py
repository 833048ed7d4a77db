"""The systemd units of deploy/systemd, as systemd reads them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "deploy/systemd"
UNITS = SYSTEMD / "system"
PROGRAM = "/opt/inferq/bin/inferq"


@dataclass(frozen=True)
class Unit:
    """A service with its drop-ins; `settings` in order, those of drop-ins last."""

    name: str
    settings: tuple[tuple[str, str], ...]

    def every(self, key: str) -> list[str]:
        return [value for name, value in self.settings if name == key]

    def last(self, key: str) -> str:
        return self.every(key)[-1]

    def seconds(self, key: str) -> int:
        return int(self.last(key))

    @property
    def part(self) -> str:
        """`gateway`, `worker`, …"""
        return re.split(r"[@.]", self.name.removeprefix("inferq-"))[0]

    @property
    def environment(self) -> dict[str, str]:
        """What the unit itself sets."""
        pairs = (shlex.split(line) for line in self.every("Environment"))
        return dict(pair.split("=", 1) for line in pairs for pair in line)

    def environment_with(self, folder: Path) -> dict[str, str]:
        """The environment of the process, with the files of `folder` for those in /etc/inferq."""
        whole = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"} | self.environment
        for line in self.every("EnvironmentFile"):
            file = folder / Path(line.removeprefix("-")).name
            if file.exists() or not line.startswith("-"):
                whole |= read_env(file.read_text("utf-8"))
        return whole

    def command(self, environment: dict[str, str]) -> list[str]:
        """The words of ExecStart after the program, with the variables of the environment."""
        program, *words = shlex.split(self.last("ExecStart"))
        assert program == PROGRAM
        return [re.sub(r"\${(\w+)}", lambda found: environment[found[1]], word) for word in words]


def read_env(text: str) -> dict[str, str]:
    """The variables of an EnvironmentFile."""
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("=", 1) for line in lines if line and line[0] not in "#;")


def unit(name: str) -> Unit:
    """The unit of that name, such as `inferq-worker@ocr.service`."""
    template = re.sub(r"@.*\.", "@.", name)
    instance = name[name.find("@") + 1 :].removesuffix(".service") if "@" in name else ""
    # systemd also looks below the name cut after a dash, for templates with the @.
    short = re.sub(r"^(inferq-)[^@.]*", r"\1", template)
    folders = [UNITS / f"{each}.d" for each in dict.fromkeys((short, template, name))]
    drop_ins = sorted((file for each in folders for file in each.glob("*.conf")), key=lambda file: file.name)
    settings = []
    for file in (UNITS / template, *drop_ins):
        for line in file.read_text("utf-8").splitlines():
            if line and line[0] not in "#;[":
                key, value = line.split("=", 1)
                settings.append((key, value.replace("%i", instance).replace("%H", "host")))
    return Unit(name, tuple(settings))


def services() -> list[Unit]:
    """All parts, with one worker for a type of every time limit."""
    names = [file.name for file in sorted(UNITS.glob("inferq-*.service"))]
    return [unit(name.replace("@.", "@echo.")) for name in names]
