"""The commands by name, each loaded when it is asked for: loading them all takes a second."""

from __future__ import annotations

from collections import UserDict
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

_GROUP = "inferq.commands"
_OWN = {
    "gateway": "server",
    "submit": "tasks",
    "status": "tasks",
    "result": "tasks",
    "cancel": "tasks",
    "list": "tasks",
    "settings": "settings",
    "listen": "listen",
    "beat": "nightly",
    "up": "up",
    "down": "up",
    "topology": "topology",
    "batch": "batch",
    "dead": "dead",
    "keys": "keys",
    "nightly": "nightly",
    "callback": "callbacks",
    "secrets": "secrets",
}
"""In which module of this folder a command is; the other rooms' announce themselves as entry points."""


class Parts(UserDict[str, Any]):
    """An entry point for each command, which becomes the command where it is read."""

    def __init__(self) -> None:
        own = [EntryPoint(name, f"{__package__}.{module}:app", _GROUP) for name, module in _OWN.items()]
        others = sorted(entry_points(group=_GROUP), key=lambda point: point.name)
        super().__init__({point.name: point for point in (*own, *others)})

    def __getitem__(self, name: str) -> Any:
        part = self.data[name]
        if isinstance(part, EntryPoint):
            part = self.data[name] = _load(part)
        return part


def _load(point: EntryPoint) -> Any:
    """The command itself, or the group of commands, out of the application that has it."""
    group = typer.main.get_group(point.load())
    return group if group.name == point.name else group.commands[point.name]


class LazyGroup(TyperGroup):
    """The command line as a whole."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.commands = Parts()
