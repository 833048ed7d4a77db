"""What the command line prints, whoever has written it."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.text import Text

from inferq.consumers.weights.cache import WeightsCache, WeightsSettings
from inferq.producer.cli import output
from inferq.schemas import InferqError, InstallationError
from inferq.schemas.errors import EXIT_CONFIG

EVIL = "a\x1b]0;title\x07\x9b31mb\x7f\udcff"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns that both consoles print to."""
    shown = io.StringIO()
    for name in ("console", "errors"):
        kind: type[Console] = type(getattr(output, name))
        terminal = kind(file=shown, force_terminal=True, width=80, color_system=None)
        monkeypatch.setattr(output, name, terminal)
    return shown


def follow() -> None:
    with Progress(TextColumn("{task.description}", markup=False), console=output.errors) as bars:
        bars.add_task(EVIL)


@pytest.mark.parametrize(
    "told",
    [
        lambda: output.print_table(["id", EVIL], [("1", EVIL)]),
        lambda: output.complain(EVIL),
        lambda: output.console.print(EVIL),
        lambda: output.console.rule(Text(EVIL)),
        follow,
    ],
)
def test_a_terminal_is_sent_no_commands_of_others(screen: io.StringIO, told: Callable[[], None]) -> None:
    told()
    shown = screen.getvalue()
    assert r"a\u001b]0;" in shown
    assert "\x1b]" not in shown
    assert not set(shown) & {"\x07", "\x9b", "\x7f", "\udcff"}


def test_lines_stay_lines(screen: io.StringIO) -> None:
    output.console.print("李明\nb")
    assert screen.getvalue() == "李明\nb\n"


def test_a_task_id_is_printed_as_it_is(screen: io.StringIO) -> None:
    output.console.print("x:cat:y [b]")
    output.complain("x:cat:y [b]")
    assert screen.getvalue() == "x:cat:y [b]\nerror: x:cat:y [b]\n"


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": EVIL, "b": "李明"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": EVIL, "b": "李明"}
    assert "李明" in printed
    assert not set(printed) & {"\x9b", "\x7f", "\udcff"}


ROW = ("msg_" + "0" * 27, "0" * 36, None, "https://example.com/" + "x" * 60)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, ["callback", ROW[0], "id", ROW[1], "url", ROW[3][:73], ROW[3][73:]]),
        (
            ("msg_1", "t1", 404, "http://a"),
            ["callback", "id", "last", "url", "msg_1", "t1", "404", "http://a"],
        ),
    ],
)
def test_what_does_not_fit_is_told_field_by_field(
    screen: io.StringIO, row: tuple[object, ...], expected: list[str]
) -> None:
    output.print_records(["callback", "id", "last", "url"], [row])
    shown = screen.getvalue()
    assert all(word in shown for word in map(str, row[:2]))
    assert "".join(shown.split()) == "".join(expected)


def test_a_pipe_is_given_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_records(["callback", "id", "last", "url"], [ROW, ROW])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InstallationError("pip install 'inferq[ocr]'", code="engine_not_installed"), EXIT_CONFIG),
        (InstallationError("INFERQ_SLOTS: not a number", code="bad_settings"), EXIT_CONFIG),
        (InstallationError("no such GPU", code="device_unavailable"), 1),
        (InferqError("the gateway does not answer"), 1),
    ],
)
def test_a_fault_that_no_restart_repairs_has_an_exit_status_of_its_own(
    error: InferqError, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    main = importlib.import_module("inferq.producer.cli.main")  # the package has its function under this name
    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(main, "open_standard_streams", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == status


def run_cli(*arguments: str | bytes, **environment: str) -> tuple[int, str, str]:
    code = "from inferq.producer.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **environment},
        capture_output=True,
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


def test_an_encoding_without_all_characters_ends_nothing() -> None:
    status, printed, said = run_cli("topology", "show", "--types", "echo", PYTHONIOENCODING="latin-1")
    assert (status, said) == (0, "")
    assert "celery_delayed_1 \\u2192 celery_delayed_0" in printed


def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    output.print_json({"a": "\u674e\u00e9", "b": EVIL})
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode("latin-1"))["a"] == "\u674e\u00e9"


@pytest.mark.parametrize(
    "arguments", [("submit", "ner", b"\xff"), ("submit", "ner", "--set", b"text=\xff"), ("status", b"\xff")]
)
def test_an_argument_that_is_not_utf_8_is_named_as_such(arguments: tuple[str | bytes, ...]) -> None:
    status, _, said = run_cli(*arguments, INFERQ_API_KEY="k", INFERQ_API_URL="http://127.0.0.1:9")
    assert status == 1
    assert said.startswith("error:")
    assert "is not UTF-8" in said


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", absent)
    with pytest.raises(InstallationError, match=r"INFERQ_WEIGHTS_CACHE is .*: set HOME"):
        WeightsCache(WeightsSettings())
