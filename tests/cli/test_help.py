"""`inferq --help`: every command by group, on one screen, without loading the commands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from inferq.producer.cli.parts import HELP, Parts, first_sentence
from tests.installation import inferq_here

LISTED = {name: text for group in HELP.values() for name, text in group.items()}


def _help(*arguments: str, columns: int) -> list[str]:
    return inferq_here({"COLUMNS": str(columns)}, *arguments).stdout.splitlines()


def test_every_command_of_this_installation_is_in_one_group() -> None:
    assert sorted(LISTED) == sorted(Parts())
    assert len(LISTED) == sum(len(group) for group in HELP.values())


@pytest.mark.parametrize("name", LISTED)
def test_the_help_shown_is_the_first_sentence_of_the_commands_own(name: str) -> None:
    assert LISTED[name] == first_sentence(Parts()[name])


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ()])
def test_the_help_fits_a_screen(arguments: tuple[str, ...], columns: int) -> None:
    lines = _help(*arguments, columns=columns)
    assert len(lines) <= 30
    assert max(map(len, lines)) <= columns
    for group, commands in HELP.items():
        start = next(index for index, line in enumerate(lines) if line.startswith(f"{group} "))
        for line, (name, text) in zip(lines[start:], commands.items(), strict=False):
            assert line.removeprefix(group).strip().split(maxsplit=1) == [name, text]


def test_the_help_loads_no_command() -> None:
    code = (
        "import sys\n"
        "from inferq.producer.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print(*sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "inferq.producer.cli.parts" in loaded
    commands = {point.module for point in Parts().data.values()}
    assert "inferq.producer.cli.tasks" in commands
    assert not loaded & (commands | {"inferq.broker", "httpx", "pika", "celery"})


def test_a_command_that_is_no_part_of_inferq_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for group in HELP.values():
        monkeypatch.delitem(group, "up", raising=False)
    from typer.testing import CliRunner

    from inferq.producer.cli import app

    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert [line.split() for line in shown.splitlines() if line.startswith("Other")] == [
        ["Other", "up", *LISTED["up"].split()]
    ]
