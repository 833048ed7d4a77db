"""The commands by name, each loaded when it is used: loading all of them takes a second."""

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
    "canary": "canary",
    "dead": "dead",
    "keys": "keys",
    "nightly": "nightly",
    "callback": "callbacks",
    "secrets": "secrets",
    "plan": "plan",
    "usage": "usage",
    "top": "top",
}
"""In which module of this folder a command is; the other rooms' announce themselves as entry points."""

HELP = {
    "Work": {
        "submit": "Submit tasks; files among the inputs are uploaded.",
        "status": "Show where a task stands.",
        "result": "Print how a task ended.",
        "cancel": "Cancel a task, queued or running.",
        "list": "List tasks, the newest first.",
        "callback": "List callbacks and send them again.",
        "listen": "Receive callbacks and verify them, until Ctrl-C.",
    },
    "Batches": {
        "batch": "Submit many tasks from one source, and follow them.",
        "nightly": "Check, list and start nightly runs.",
    },
    "Operate": {
        "canary": "Compare new code or weights with the old ones.",
        "dead": "List, redrive and purge dead letters.",
        "keys": "Add, list and remove API keys.",
        "plan": "Work out workers, GPU hours and cost for a load.",
        "secrets": "Rotate the secrets that sign callbacks.",
        "settings": "List the settings, their defaults and values here.",
        "top": "Show queues, workers and batches live, until Ctrl-C.",
        "topology": "Show, declare and check the exchanges and queues.",
        "usage": "Print the engine seconds of tenants, types and days.",
        "weights": "Fetch, check and sign the engines' weights.",
    },
    "Run parts": {
        "up": "Start everything, with a private RabbitMQ and Redis.",
        "down": "Stop `inferq up`, and wait for its end.",
        "gateway": "Serve the HTTP interface, until SIGTERM.",
        "worker": "Compute tasks of one or more types, until SIGTERM.",
        "callbacks": "Deliver callbacks and feed batches, until SIGTERM.",
        "beat": "Start nightly runs when they are due, until SIGTERM.",
        "monitor": "Read figures of queues and workers, until SIGTERM.",
        "scale-in-guard": "Let scale-in remove idle workers only, until SIGTERM.",
    },
}
"""The groups of `inferq --help`: the first sentence of each command's own help, shown without loading it."""


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


def first_sentence(command: Any) -> str:
    """The first sentence of a command's help."""
    return (command.help or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".") + "."


class LazyGroup(TyperGroup):
    """The command line as a whole."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.commands = Parts()

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - as typer's own, it prints
        """Print the commands by group, one line each, so that all of them fit on a screen."""
        from rich.console import Console
        from rich.table import Table

        listed = {name for group in HELP.values() for name in group}
        others = {name: first_sentence(self.commands[name]) for name in self.commands if name not in listed}
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column()
        for group, commands in (HELP | ({"Other": others} if others else {})).items():
            for position, (name, text) in enumerate(commands.items()):
                table.add_row("" if position else group, name, text)
        options = "  ".join(", ".join(option.opts) for option in self.get_params(ctx))
        console = Console(highlight=False)
        console.print(f"[bold]Usage:[/] {self.name} COMMAND [ARGS]...", soft_wrap=True)
        console.print(f"{self.help} `{self.name} COMMAND --help` says more.", soft_wrap=True)
        console.print(table)
        console.print(f"[bold]Options:[/] {options}", soft_wrap=True, end="")
