"""The data folder: its holder, its ports, and the variables for other shells."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferq.producer.up.folder import DataFolder
from inferq.producer.up.orphan_reaper import alive
from inferq.producer.up.part import Part
from inferq.producer.up.process import LOG_BYTES, last_lines, spawn, stop
from inferq.schemas import InferqError, InstallationError


def test_second_holder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    first = DataFolder(tmp_path / "data")
    first.hold()
    with pytest.raises(InferqError, match=rf"pid {os.getpid()}\).*inferq down") as refused:
        DataFolder(tmp_path / "data").hold()
    assert refused.value.code == "already_up"
    assert first.held()
    first.release()
    assert not first.held()
    DataFolder(tmp_path / "data").hold()


def test_folder_that_never_was_is_not_held_and_is_not_made(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "none")
    assert not folder.held()
    assert folder.holder() is None
    assert not folder.path.exists()


def test_folder_that_cannot_be_made_is_an_installation_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallationError, match="--data"):
        DataFolder(tmp_path / "file" / "data").hold()


def test_ports_are_kept_until_somebody_takes_one(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    first = folder.ports(["amqp", "redis", "epmd"])
    assert len(set(first.values())) == 3
    assert folder.ports(["amqp", "redis", "epmd"]) == first
    with socket.create_server(("127.0.0.1", first["redis"])):
        second = folder.ports(["amqp", "redis", "epmd"])
    assert second["redis"] not in first.values()
    assert second | {"redis": 0} == first | {"redis": 0}
    assert folder.ports(["redis"]) == {"redis": second["redis"]}


def test_ports_of_parts_that_do_not_start_stay_theirs(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    first = folder.ports(["a", "b"])
    assert folder.ports(["c"])["c"] not in first.values()
    assert folder.ports(["a", "b"]) == first


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"a": "x"}', '{"a": null}'])
def test_broken_port_file_is_made_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "ports.json").write_text(text)
    folder = DataFolder(tmp_path)
    ports = folder.ports(["a"])
    assert isinstance(ports["a"], int)
    assert folder.ports(["a"]) == ports


@settings(max_examples=25)
@given(value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=60))
def test_shell_reads_from_env_what_was_written(tmp_path_factory, value: str) -> None:
    folder = DataFolder(tmp_path_factory.mktemp("data"))
    folder.write_env({"INFERQ_A": value, "INFERQ_B": "b"})
    assert folder.kept_env() == {"INFERQ_A": value, "INFERQ_B": "b"}
    shell = subprocess.run(
        ["sh", "-c", '. "$1"; printf %s "$INFERQ_A"', "sh", str(folder.env_file)],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert shell.stdout.decode() == value


def test_env_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.write_env({"INFERQ_API_KEY": "iq_secret"})
    assert folder.env_file.stat().st_mode & 0o077 == 0


def test_unreadable_env_counts_as_none(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    assert folder.kept_env() == {}
    folder.env_file.write_text("export A='unfinished")
    assert folder.kept_env() == {}


def test_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    while alive(process.pid):
        pass
    assert process.wait() == 0
    assert alive(os.getpid())


def sleeper(**given) -> Part:
    return Part("sleeper", ("sleep", "600"), dict(os.environ), lambda: None, **given)


def test_large_log_is_set_aside_when_its_part_starts(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "sleeper.log"
    log.parent.mkdir()
    log.write_bytes(b"")
    os.truncate(log, LOG_BYTES + 1)
    process = spawn(sleeper(), log)
    stop(process, sleeper())
    assert log.stat().st_size == 0
    assert log.with_name("sleeper.log.1").stat().st_size == LOG_BYTES + 1


def test_large_log_that_cannot_be_copied_stays_and_holds_up_no_start(tmp_path: Path) -> None:
    log = tmp_path / "sleeper.log"
    log.write_bytes(b"")
    os.truncate(log, LOG_BYTES + 1)
    log.with_name("sleeper.log.1").mkdir()  # as good as a full disk
    process = spawn(sleeper(), log)
    stop(process, sleeper())
    assert log.stat().st_size == LOG_BYTES + 1


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    part = Part(
        "deaf",
        ("sh", "-c", "trap '' TERM; sleep 600 & while :; do sleep 600; done"),
        dict(os.environ),
        lambda: None,
        grace=0.2,
    )
    process = spawn(part, tmp_path / "log")
    stop(process, part)
    assert process.returncode is not None
    assert not alive(process.pid)


def test_last_lines_of_a_log_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == []
    log.write_bytes(b"first\n\n\xff\xfe\n" + b"".join(b"%d\n" % n for n in range(100)))
    assert last_lines(log, 2) == ["98", "99"]
