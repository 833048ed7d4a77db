"""deploy/systemd: the units say what systemd understands, and start what the code has."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

import httpx
import pytest
import typer

from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.producer.cli.main import app
from inferq.producer.cli.settings import variables
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.settings import GatewaySettings
from inferq.producer.up.part import find_program, free_ports
from inferq.schemas import InstallationError, installed_types
from inferq.schemas.errors import EXIT_CONFIG
from tests.conftest import RabbitMQ
from tests.deploy.units import PROGRAM, SYSTEMD, UNITS, Unit, read_env, services, unit
from tests.waiting import eventually

_MOST_EXPOSED = 18
"""Tenths. systemd calls services up to 2.0 `OK`, one without any directive 9.2."""
_NOT_OURS = {
    "HOME", "TMPDIR", "TYPE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "PADDLE_PDX_CACHE_HOME", "PPNLP_HOME", "HF_HOME",
}  # fmt: skip
"""Variables of systemd's, of libraries', and of the units' own."""


@pytest.fixture
def analyze(tmp_path: Path) -> list[str]:
    """`systemd-analyze` and a copy of the units that names programs of this machine."""
    program = find_program("systemd-analyze", [])
    if program is None:
        pytest.skip("systemd-analyze is not on PATH; Debian's package systemd has it")
    shutil.copytree(UNITS, tmp_path / "system", symlinks=True)
    for file in (tmp_path / "system").glob("*.service"):
        text = file.read_text("utf-8").replace(PROGRAM, sys.executable)
        file.write_text(text.replace("/usr/bin/nvidia-modprobe", sys.executable), "utf-8")
    return [str(program)]


def _checked(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_understands_every_line(analyze: list[str], tmp_path: Path) -> None:
    units = [f"./{each.name}" for each in services()] + ["./nvidia-device-nodes.service", "./inferq.target"]
    # It prints what it does not know, and succeeds.
    assert _checked([*analyze, "verify", "--man=no", *units], tmp_path / "system") == ""


def test_every_part_is_shut_off_from_the_machine(analyze: list[str], tmp_path: Path) -> None:
    names = [f"./{each.name}" for each in services()]
    limit = f"--threshold={_MOST_EXPOSED}"
    printed = _checked([*analyze, "security", "--offline=true", limit, *names], tmp_path / "system")
    assert len(re.findall(r"Overall exposure level for inferq-", printed)) == len(names)


def test_the_settings_of_units_and_files_exist() -> None:
    known = {variable.name for variable in variables()} | _NOT_OURS
    example = (SYSTEMD / "inferq.env").read_text("utf-8")
    named = set(read_env(example)) | set(re.findall(r"^#(\w+)=", example, re.M))
    assert "AWS_ACCESS_KEY_ID" in named
    for each in services():
        named |= set(each.environment)
    assert named - known == set()


@pytest.mark.parametrize("each", services(), ids=lambda each: each.name)
def test_a_restart_is_tried_where_it_can_help(each: Unit) -> None:
    # A signal such as SIGHUP counts as a success, also one that comes before the part handles it.
    assert each.last("Restart") == "always"
    assert int(each.last("RestartPreventExitStatus")) == EXIT_CONFIG
    assert each.last("Type") == "exec", "no part tells systemd that it is ready"


def test_an_instance_that_names_no_type_is_not_started_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = unit("inferq-worker@nonsense.service")
    with pytest.raises(InstallationError) as raised:
        typer.main.get_command(app)(started.command(started.environment), standalone_mode=False)
    assert raised.value.exit_status == EXIT_CONFIG


def test_a_stopped_worker_may_finish_its_task() -> None:
    for name, task_type in installed_types().items():
        worker = unit(f"inferq-worker@{name}.service")
        grace = float(worker.environment["INFERQ_GRACE_SECONDS"])
        assert grace >= task_type.time_limit + 30, name
        assert worker.seconds("TimeoutStopSec") >= grace + 60, name
    # Otherwise systemd's SIGTERM ends the engine, and with it the run.
    assert worker.last("KillMode") == "mixed"
    # Otherwise one engine without memory stops the whole worker.
    assert worker.last("OOMPolicy") == "continue"


def test_the_other_parts_may_finish_what_is_in_progress() -> None:
    gateway, callbacks = unit("inferq-gateway.service"), unit("inferq-callbacks.service")
    assert gateway.seconds("TimeoutStopSec") > GatewaySettings().shutdown_grace + 5
    assert callbacks.seconds("TimeoutStopSec") > CallbackSettings().callback_timeout + 5


def test_every_user_and_folder_of_a_unit_is_made() -> None:
    made = set(re.findall(r"^[ug] (\S+)", (SYSTEMD / "sysusers.d/inferq.conf").read_text("utf-8"), re.M))
    used = {name for each in services() for name in (each.last("User"), each.last("Group"))}
    assert used == made
    folders = re.findall(r"^d (\S+)", (SYSTEMD / "tmpfiles.d/inferq.conf").read_text("utf-8"), re.M)
    for each in services():
        assert {path.lstrip("-") for path in each.every("ReadWritePaths")} <= set(folders)
        for path in re.findall(r"/var/(?:lib|cache)/\S+", " ".join(each.environment.values())):
            own = {f"/var/lib/{name}" for name in each.every("StateDirectory")}
            own |= {f"/var/cache/{name}" for name in each.every("CacheDirectory")}
            assert any(path == folder or path.startswith(f"{folder}/") for folder in own), path


@pytest.fixture
def etc(tmp_path: Path, shared_rabbitmq: RabbitMQ, fresh_amqp_url: str, redis_url: str) -> Path:
    """/etc/inferq of a machine, with the services of the tests."""
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "schedules.toml").write_text("", "utf-8")
    (folder / "gateway.env").write_text(
        f"INFERQ_API_KEYS_FILE={tmp_path}/api-keys.json\nINFERQ_GATEWAY_PORT={free_ports(1)[0]}\n", "utf-8"
    )
    (folder / "worker-echo-1.env").write_text(f"TYPE=echo\nINFERQ_SCRATCH_DIR={tmp_path}\n", "utf-8")
    lines = (SYSTEMD / "inferq.env").read_text("utf-8")
    store = (tmp_path / "store").as_uri()
    lines += f"INFERQ_AMQP_URL={fresh_amqp_url}\nINFERQ_REDIS_URL={redis_url}\nINFERQ_STORE_URL={store}\n"
    (folder / "inferq.env").write_text(lines, "utf-8")
    return folder


@contextmanager
def _running(started: Unit, etc: Path) -> Iterator[Popen[bytes]]:
    """The process of a unit, with its environment and no other; SIGTERM ends it well."""
    environment = started.environment_with(etc)
    process = Popen(
        [sys.executable, "-P", "-m", "inferq.producer.cli", *started.command(environment)],
        cwd="/",
        env=environment,
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_task_gets_through_the_parts_that_the_units_start(etc: Path, tmp_path: Path) -> None:
    gateway, worker = unit("inferq-gateway.service"), unit("inferq-worker@echo-1.service")
    key = KeyFile(tmp_path / "api-keys.json").add("default")
    url = f"http://127.0.0.1:{gateway.environment_with(etc)['INFERQ_GATEWAY_PORT']}"
    with ExitStack() as stack:
        processes = [stack.enter_context(_running(each, etc)) for each in (gateway, worker)]
        client = stack.enter_context(
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=70)
        )

        def ready() -> bool:
            assert all(process.poll() is None for process in processes)
            return _ready(client)

        eventually(ready)
        task = {"task_type": "echo", "payload": "through"}
        answer = client.post("/v1/tasks", json=task, headers={"Prefer": "wait=60"})
        assert (answer.status_code, answer.json()["state"]) == (200, "succeeded"), answer.text


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("part", ["callbacks", "batches", "beat", "monitor"])
def test_the_other_parts_start_too(
    part: str, etc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = unit(f"inferq-{part}.service")
    environment = started.environment_with(etc)
    if part == "beat":
        environment["INFERQ_SCHEDULES_FILE"] = str(etc / Path(environment["INFERQ_SCHEDULES_FILE"]).name)
    for name in [name for name in os.environ if name.startswith("INFERQ_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [*started.command(environment), "--check"]
    typer.main.get_command(app)(command, standalone_mode=False)
    assert command[0] in capsys.readouterr().out
