"""`inferq up` and `inferq down`, as a person runs them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from typer import Exit

from inferq.producer.cli import up as commands
from inferq.producer.client.sync_client import Client
from inferq.producer.up import foreground
from inferq.producer.up.detached import while_up
from inferq.producer.up.folder import DataFolder
from inferq.producer.up.foreground import UpOptions
from inferq.producer.up.plan import choose_types, http_ready, make_plan
from inferq.producer.up.supervisor import PartFailed
from inferq.schemas import InferqError, InstallationError
from inferq.schemas.probe_server import ProbeServer, Readiness
from tests.monitoring.exported import lacking, served
from tests.waiting import eventually

INFERQ = (sys.executable, "-P", "-m", "inferq.producer.cli")
PLUGIN = Path(__file__).parents[1] / "plugin"


def processes_of(data: Path) -> list[str]:
    """The command lines of all processes that have to do with a data folder."""
    needle = str(data).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and needle in (
                (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            ):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data folder; whatever a failed test leaves running on it is stopped."""
    folder = tmp_path / "data"
    yield folder
    holder = DataFolder(folder)
    if holder.held() and (pid := holder.holder()) != os.getpid():
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not holder.held(), "the guard has done its work")


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch, fresh_amqp_url: str, redis_url: str) -> None:
    """The shared broker and Redis, by the environment: starts in a second or two."""
    monkeypatch.setenv("INFERQ_AMQP_URL", fresh_amqp_url)
    monkeypatch.setenv("INFERQ_REDIS_URL", redis_url)


def inferq(*arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*INFERQ, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )


def start(data: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*INFERQ, "up", "--data", str(data), "--port", "0", "--types", "echo", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def client(data: Path) -> Client:
    env = DataFolder(data).kept_env()
    return Client(env["INFERQ_API_URL"], env["INFERQ_API_KEY"])


def test_foreground_serves_tasks_until_ctrl_c(data: Path, services: None) -> None:
    process = start(data)
    said = []
    for line in process.stdout:
        said.append(line)
        if "Stop it with Ctrl-C" in line:
            break
    assert any("inferq is ready" in line for line in said), said
    with client(data) as inferq_client:
        status = inferq_client.submit("echo", payload="hello", wait=60)
        assert inferq_client.result(status.task_id).output == {"payload": "hello"}
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "inferq has stopped" in out
    assert "Traceback" not in out
    assert processes_of(data) == []


def test_detached_serves_until_down(data: Path, services: None) -> None:
    up = inferq("up", "--data", str(data), "--port", "0", "--types", "echo", "--detach")
    assert up.returncode == 0, up.stdout
    assert f"inferq down --data {shlex.quote(str(data))}" in up.stdout.replace("\n", "")
    api = DataFolder(data).kept_env()["INFERQ_API_URL"]
    assert httpx.get(f"{api}/readyz").status_code == 200

    again = inferq("up", "--data", str(data), "--port", "0", "--types", "echo")
    assert again.returncode == 1
    assert f"pid {DataFolder(data).holder()}" in again.stdout

    down = inferq("down", "--data", str(data))
    assert (down.returncode, "has stopped" in down.stdout) == (0, True)
    assert processes_of(data) == []
    down = inferq("down", "--data", str(data))
    assert (down.returncode, "is not up" in down.stdout) == (0, True)


def test_private_services_go_with_a_killed_supervisor_and_their_data_stays(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INFERQ_AMQP_URL", "INFERQ_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    first = inferq("up", "--data", str(data), "--port", "0", "--types", "echo", "--detach")
    assert first.returncode == 0, first.stdout
    env = DataFolder(data).kept_env()
    with client(data) as inferq_client:
        done = inferq_client.submit("echo", payload="before", wait=60)
        assert done.state == "succeeded"

    os.kill(DataFolder(data).holder(), signal.SIGKILL)
    # The shell that starts it again has sourced `env`: those services are its own, not somebody else's.
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    second = inferq("up", "--data", str(data), "--port", "0", "--types", "echo", "--detach")
    assert second.returncode == 0, second.stdout
    assert DataFolder(data).kept_env() == env
    assert "rabbitmq is ready" in second.stdout
    with client(data) as inferq_client:
        assert inferq_client.result(done.task_id).output == {"payload": "before"}
        assert inferq_client.submit("echo", payload="after", wait=60).state == "succeeded"
    assert inferq("down", "--data", str(data)).returncode == 0
    assert processes_of(data) == []


def test_taken_port_is_an_error_that_says_so(data: Path, services: None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        up = inferq("up", "--data", str(data), "--port", port, "--types", "echo", "--detach")
    assert up.returncode == 1
    assert f"port {port} is taken" in up.stdout
    assert not DataFolder(data).held()


def test_part_that_cannot_start_fails_the_start_with_its_reason(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_SLOTS", "none")
    for more in ((), ("--detach",)):
        process = start(data, *more)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "worker-echo ended with exit code" in out
        assert "INFERQ_SLOTS" in out
        assert "Traceback" not in out
        assert processes_of(data) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_starter_that_goes_away_before_all_is_ready_takes_everything_along(
    data: Path, services: None, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "load").write_text("slow")
    monkeypatch.setenv("FAULTY_LOAD", str(tmp_path / "load"))
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN))
    process = start(data, "--detach", "--types", "faulty")
    eventually(lambda: "inferq.producer.cli worker" in " ".join(processes_of(data)), "the worker is starting")
    process.send_signal(number)
    out, _ = process.communicate(timeout=240)
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert "inferq has stopped" in out
        assert "Traceback" not in out
        assert processes_of(data) == []
    eventually(lambda: not DataFolder(data).held(), "everything is gone")
    assert processes_of(data) == []


def test_while_up_lasts_as_long_as_its_block_and_exports_what_boards_and_rules_use(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_TRACK", "stable")
    data.mkdir()
    schedule = '[a]\ncron = "0 1 * * *"\nsource = "s3://scans/in/"\ntask_type = "ocr"\n'
    (data / "schedules.toml").write_text(schedule)
    with while_up(UpOptions(data, 0, ("echo",)), report=lambda report: None) as env:
        assert httpx.get(f"{env['INFERQ_API_URL']}/readyz").status_code == 200
        assert DataFolder(data).held()
        with client(data) as inferq_client:
            inferq_client.submit("echo", payload="hello", callback_url="http://127.0.0.1:9/", wait=60)
        ports = json.loads((data / "ports.json").read_text())
        pages = [
            f"http://127.0.0.1:{port}/metrics"
            for name, port in ports.items()
            if name == "gateway" or name.startswith("probe-")
        ]
        assert len(pages) == 6

        def faults() -> dict[str, str]:
            found = lacking(served(httpx.get(page).text for page in pages))
            return {name: fault for name, fault in found.items() if not name.startswith("inferq_gpu_")}

        with suppress(TimeoutError):
            eventually(lambda: not faults())
        assert faults() == {}
    assert processes_of(data) == []
    assert not DataFolder(data).held()


def test_while_up_ends_with_its_process(data: Path, services: None) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from inferq.producer.up.detached import while_up; from inferq.producer.up.foreground import UpOptions\n"
        "with while_up(UpOptions(Path(sys.argv[1]), 0, ('echo',)), report=lambda report: None):\n"
        "    print('up', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(data)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.communicate()
    eventually(lambda: not processes_of(data), "everything is gone")


@pytest.mark.parametrize(
    ("name", "url"),
    [("INFERQ_AMQP_URL", "amqp://u:p@127.0.0.1:9/"), ("INFERQ_REDIS_URL", "redis://127.0.0.1:9/0")],
)
def test_named_service_that_does_not_answer_is_an_error(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(name, url)
    folder = DataFolder(data)
    folder.hold()
    with pytest.raises(InferqError, match=f"{name} names does not answer") as refused:
        make_plan(folder, port=0, types=("echo",))
    folder.release()
    assert refused.value.code == "not_answering"


def test_the_broker_and_the_store_that_the_environment_names_are_used(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch, fresh_amqp_url: str, tmp_path: Path
) -> None:
    several = f"amqp://u:p@127.0.0.1:9/,{fresh_amqp_url}"  # the nodes of a cluster, one of them down
    monkeypatch.setenv("INFERQ_AMQP_URL", several)
    monkeypatch.setenv("INFERQ_STORE_URL", (tmp_path / "elsewhere").as_uri())
    folder = DataFolder(data)
    folder.hold()
    plan = make_plan(folder, port=0, types=("echo",))
    folder.release()
    assert plan.variables["INFERQ_AMQP_URL"] == several
    assert plan.variables["INFERQ_STORE_URL"] == (tmp_path / "elsewhere").as_uri()
    assert plan.facts["store"] == "the one that INFERQ_STORE_URL names"


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("INFERQ_STORE_URL", "nowhere:geheim"),
        ("INFERQ_AMQP_URL", "amqp://u:geheim@127.0.0.1:port/"),
        ("INFERQ_AMQP_URL", "amqp://u:geheim@127.0.0.1:99999/"),
        ("INFERQ_AMQP_URL", "localhost:5672"),
        ("INFERQ_REDIS_URL", "localhost:6379"),
        ("INFERQ_REDIS_URL", "redis://:geheim@localhost:port/0"),
    ],
)
def test_address_that_cannot_be_one_names_its_setting(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(name, url)
    data.mkdir()
    with pytest.raises(InstallationError, match=name) as refused:
        make_plan(DataFolder(data), port=0, types=("echo",))
    assert "geheim" not in refused.value.message


@pytest.mark.parametrize("more", [(), ("--detach",)])
def test_data_folder_that_cannot_be_used_is_one_line(tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    up = inferq("up", "--data", str(tmp_path / "file" / "data"), "--port", "0", "--types", "echo", *more)
    assert up.returncode == 1
    assert "choose another with --data" in up.stdout
    assert "Traceback" not in up.stdout


def test_callbacks_to_this_machine_are_for_the_owner_unless_the_operator_allows_more(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings() -> tuple[str | None, str | None]:
        plan = make_plan(folder, port=0, types=("echo",))
        (env,) = (part.env for part in plan.parts if part.name == "callbacks")
        return env.get("INFERQ_CALLBACK_LOOPBACK_TENANTS"), env.get("INFERQ_CALLBACK_ALLOWED_NETWORKS")

    folder = DataFolder(data)
    folder.hold()
    assert settings() == ("default", None)
    monkeypatch.setenv("INFERQ_CALLBACK_LOOPBACK_TENANTS", "")
    monkeypatch.setenv("INFERQ_CALLBACK_ALLOWED_NETWORKS", "127.0.0.0/8")
    assert settings() == ("", "127.0.0.0/8")
    folder.release()


def test_api_key_is_kept_while_it_is_valid(data: Path, services: None) -> None:
    folder = DataFolder(data)
    folder.hold()
    first = make_plan(folder, port=0, types=("echo",)).variables
    assert make_plan(folder, port=0, types=("echo",)).variables == first
    (data / "api-keys.json").unlink()
    assert make_plan(folder, port=0, types=("echo",)).variables["INFERQ_API_KEY"] != first["INFERQ_API_KEY"]
    folder.release()


def test_beat_is_a_part_where_there_are_schedules(
    data: Path, services: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = DataFolder(data)
    folder.hold()
    good = '[a]\ncron = "0 1 * * *"\nsource = "s3://scans/in/"\ntask_type = "ocr"\n'
    parts = {part.name: part for part in make_plan(folder, port=0, types=("echo",)).parts}
    assert "beat" not in parts
    assert parts["monitor"].env["INFERQ_PROBE_PORT"] not in {
        part.env["INFERQ_PROBE_PORT"] for name, part in parts.items() if name in ("callbacks", "batches")
    }
    own = folder.path / "schedules.toml"
    own.write_text(good)
    plan = make_plan(folder, port=0, types=("echo",))
    assert "beat" in [part.name for part in plan.parts]
    assert plan.variables["INFERQ_SCHEDULES_FILE"] == str(own)
    named = tmp_path / "named.toml"
    named.write_text(good.replace("0 1 * * *", "0 0 31 2 *"))
    monkeypatch.setenv("INFERQ_SCHEDULES_FILE", str(named))
    with pytest.raises(InferqError, match="never fires"):
        make_plan(folder, port=0, types=("echo",))
    folder.release()


def test_types_are_checked_and_each_is_started_once() -> None:
    assert choose_types(" echo,ocr,echo ") == ("echo", "ocr")
    assert "echo" in choose_types(None)
    for wrong in ("echo,nonsense", "", ","):
        with pytest.raises(InferqError, match=r"installed are: .*echo") as refused:
            choose_types(wrong)
        assert refused.value.code == "unknown_task_type"


def test_one_worker_serves_all_types_where_few_engines_may_be_loaded(data: Path, services: None) -> None:
    folder = DataFolder(data)
    folder.hold()
    plan = make_plan(folder, port=0, types=("echo", "ocr"), max_loaded=1)
    (worker,) = [part for part in plan.parts if part.name.startswith("worker-")]
    assert worker.argv[-2:] == ("worker", "echo,ocr")
    assert worker.env["INFERQ_MAX_LOADED"] == "1"
    assert plan.facts["workers"] == "echo, ocr"
    folder.release()


def test_workers_of_all_types_are_optional_and_those_left_out_are_named(data: Path, services: None) -> None:
    folder = DataFolder(data)
    folder.hold()
    plan = make_plan(folder, port=0, types=("echo", "ocr"), required=False)
    assert {part.name for part in plan.parts if part.optional} == {"worker-echo", "worker-ocr"}
    assert plan.without(()) == plan
    less = plan.without(["worker-ocr"])
    assert less.facts["workers"] == "echo; left out: ocr"
    assert len(less.parts) == len(plan.parts) - 1
    late = plan.without((), late=["worker-ocr"])
    assert late.facts["workers"] == "echo; not ready yet, still retrying: ocr"
    assert late.parts == plan.parts
    assert not [part for part in make_plan(folder, port=0, types=("echo",)).parts if part.optional]
    folder.release()


def test_the_log_of_a_part_cannot_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_about: object, **_more: object) -> None:
        raise PartFailed("worker-ocr ended\n    \x1b[2J (from its log)")

    monkeypatch.setattr(foreground, "run_until_stopped", fail)
    with pytest.raises(Exit):
        commands.up(tmp_path, port=0, types="echo")
    shown = capsys.readouterr().out
    assert r"\u001b[2J" in shown
    assert "\x1b" not in shown


def test_unready_server_says_why() -> None:
    assert "refused" in http_ready(9)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client_side = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from inferq.producer.up.plan import http_ready; print(http_ready({port}))",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        with server.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 7\r\n\r\nloading")
        assert client_side.communicate()[0] == "/readyz answers 503 loading\n"


def test_a_worker_that_is_ready_and_waits_for_a_service_is_not_yet_started() -> None:
    state = Readiness(True, ("object store: it only reads",))
    server = ProbeServer("127.0.0.1", 0, readiness=lambda: state)
    server.start()
    try:
        assert "it only reads" in str(http_ready(server.port))
        state = Readiness(True)
        assert http_ready(server.port) is None
    finally:
        server.close()


def test_down_insists_on_a_supervisor_that_hangs(data: Path) -> None:
    script = (
        "import signal, sys, time; from pathlib import Path; from inferq.producer.up.folder import DataFolder\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); DataFolder(Path(sys.argv[1])).hold()\n"
        "print('held', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(data)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert commands.stop_supervisor(DataFolder(data), process.pid, patience=0.2, insist=2)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_down_says_where_something_cannot_be_stopped(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = DataFolder(data)
    folder.hold()
    monkeypatch.setattr(commands, "stop_supervisor", lambda folder, pid: False)
    with pytest.raises(Exit) as left:
        commands.down(data)
    assert left.value.exit_code == 1
    assert "does not stop" in capsys.readouterr().out
    folder.release()


def test_down_gives_up_on_what_no_signal_ends(data: Path) -> None:
    folder = DataFolder(data)
    folder.hold()
    with subprocess.Popen(["sleep", "600"]) as other:  # its end does not free the folder
        assert not commands.stop_supervisor(folder, other.pid, patience=0.05, insist=0.05)
    assert other.returncode == -signal.SIGTERM
    folder.release()
