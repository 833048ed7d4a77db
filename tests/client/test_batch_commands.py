"""Which files `inferq batch submit` finds, against a running gateway."""

from __future__ import annotations

import errno
import glob
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferq.storage.objects.results import upload_key
from tests.gateway.conftest import Gateway
from tests.installation import inferq_here

Submit = Callable[..., tuple[list[str], subprocess.CompletedProcess[str]]]


@pytest.fixture
def submit(lone_gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submits from `tmp_path`; returns the files that became lines, in order."""
    monkeypatch.chdir(tmp_path)
    env = {"INFERQ_API_URL": lone_gateway.url, "INFERQ_API_KEY": lone_gateway.key}

    def call(*sources: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        run = inferq_here(env, "batch", "submit", *sources, "--type", "ner", "--json")
        file_id = json.loads(run.stdout)["source"].removeprefix("inferq:")
        lines = lone_gateway.store.get(upload_key(lone_gateway.tenant, file_id)).splitlines()
        return [json.loads(line)["metadata"]["source"] for line in lines], run

    return call


def make(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("李明在北京。")


@pytest.mark.parametrize(
    "pattern",
    ["f/*", "f/*/*", "f/**", "f/**/*", "f/**/*.txt", "f/**/d/**/*.txt", "**/c.*", "f/.h*/*", "f/[ab].txt",
     "f/?.txt", "f/d/../a.txt*", "f/*/c.txt", "./f/*.txt", "f/b[[]1].txt"],
)  # fmt: skip
def test_a_pattern_finds_what_pythons_glob_finds(submit: Submit, pattern: str) -> None:
    make("f/a.txt", "f/b.txt", "f/b[1].txt", "f/d/c.txt", "f/d/e/d/c.txt", "f/.hid/x.txt", "f/d/.y.txt")
    names = {Path(name) for name in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    expected = sorted(name for name in names if name.is_file())
    assert expected
    found, run = submit(pattern)
    assert run.returncode == 0
    assert found == [str(path) for path in expected]


@pytest.mark.parametrize("source", ["f", "f/**/*.txt", "f/*/*.txt"])
def test_an_unreadable_folder_is_skipped_and_named(
    submit: Submit, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("f/deep/a.txt", "f/locked/b.txt")
    scandir = os.scandir

    def refusing(path: Any) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("locked"):  # or it is a descriptor
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found, run = submit(source)
    assert run.returncode == 1
    assert found == ["f/deep/a.txt"]
    named, summary = run.stderr.splitlines()[0], run.stderr.splitlines()[-1]
    assert named == "skipped f/locked: Permission denied"
    assert "skipped 1 files or folders" in summary


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["f/**/*.txt"], ["f/a.txt", "f/sub/b.txt"]),
        (["f/*/*.txt"], ["f/loop/a.txt", "f/sub/b.txt"]),
        (["f/**/*/*.txt"], ["f/loop/a.txt", "f/sub/b.txt"]),
        (["f/sub", "f", "f/*.txt", "f/a.txt"], ["f/sub/b.txt", "f/a.txt"]),
    ],
)
def test_each_file_becomes_one_line(submit: Submit, sources: list[str], expected: list[str]) -> None:
    make("f/a.txt", "f/sub/b.txt")
    Path("f/loop").symlink_to(".")
    Path("f/sub/up").symlink_to("..")
    Path("f/same.txt").symlink_to("a.txt")
    found, run = submit(*sources)
    assert run.returncode == 0
    assert found == expected
