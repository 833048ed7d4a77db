"""The last version beside this one: each serves the other's tasks, and this one takes over what that one left.

The last version is commit OLD, built into a wheel of its own. Its packages lie at the top of the path (`schemas`,
`producer`, …), so its processes run in a folder and on a PYTHONPATH of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import pytest

from inferq import Client, Conflict
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import free_ports
from inferq.storage import WebhookSecrets
from tests.callbacks.conftest import Receiver
from tests.conftest import RabbitMQ
from tests.installation import inferq
from tests.waiting import takes_work
from tests.worker.conftest import PLUGIN, Site, eventually, site_at, starts

OLD = "d935f2c"
ROOT = Path(__file__).parents[2]
SECONDS = 90
"""How long a test waits for anything: the machine may be busy."""

pytestmark = pytest.mark.timeout(300)  # up to six processes to start, most of them twice

Version = Literal["old", "new"]


@pytest.fixture(scope="module")
def old_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The PYTHONPATH of the last version: its wheel as it would be installed, and its own plug-in for tests."""
    archive = subprocess.run(["git", "archive", OLD], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"commit {OLD} is not here (fetch the whole history): {archive.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("old")
    source, installed = folder / "source", folder / "installed"
    source.mkdir()
    # Not `tarfile`: Debian 12's Python lacks its filters, and later ones warn of their absence.
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    return os.pathsep.join((str(installed), str(source / "tests" / "plugin")))


@dataclass
class Part:
    """A process of one of the versions."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return takes_work(httpx.get(f"http://127.0.0.1:{self.port}/readyz", verify=False))
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Installation:
    """Where parts of both versions work on the same broker, Redis and store."""

    def __init__(self, site: Site, old_path: str, stack: ExitStack) -> None:
        self.site = site
        self._old_path = old_path
        self._stack = stack
        keys, secrets = site.folder / "keys.json", site.folder / "secrets.json"
        self.env = site.env | {
            "INFERQ_API_KEYS_FILE": str(keys),
            "INFERQ_API_KEY": KeyFile(keys).add("default"),
            "INFERQ_WEBHOOK_SECRETS_FILE": str(secrets),
            "INFERQ_CALLBACK_ALLOWED_NETWORKS": "127.0.0.0/8",
            "INFERQ_BATCH_LEASE": "2",
            "INFERQ_STORE_FSYNC": "false",
        }
        self.secret = WebhookSecrets(secrets).rotate("default").secret.get_secret_value()

    def start(self, version: Version, *command: str) -> Part:
        """Start a part, without waiting for it; it ends with the test."""
        (port,) = free_ports(1)
        module, path = (
            ("producer.cli", self._old_path) if version == "old" else ("inferq.producer.cli", PLUGIN)
        )
        name = f"{version}-{command[0]}"
        log = self.site.folder / f"{name}-{port}.log"
        own = {"INFERQ_PROBE_PORT": str(port), "INFERQ_WORKER_NAME": name, "PYTHONPATH": str(path)}
        if command[0] == "gateway":
            command += ("--host", "127.0.0.1", "--port", str(port))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *command],
                env=self.env | own, cwd=self.site.folder, stdout=output, stderr=output,
            )  # fmt: skip
        part = Part(process, port, log)
        self._stack.callback(part.kill)
        return part

    def client(self, gateway: Part) -> Client:
        url = f"http://127.0.0.1:{gateway.port}"
        return self._stack.enter_context(Client(url, self.env["INFERQ_API_KEY"]))

    def marker(self, name: str) -> str:
        """The file in which the engine notes each start of a task."""
        return str(self.site.folder / f"{name}.marker")

    def started(self, name: str) -> int:
        return starts(Path(self.marker(name)))

    def options(self, name: str, **more: object) -> dict[str, object]:
        return {"marker": self.marker(name), **more}


def ready(*parts: Part) -> None:
    for part in parts:
        eventually(part.ready, f"the start of {part.log.name}", seconds=SECONDS)


@pytest.fixture
def place(
    old_path: str, fresh_amqp_url: str, shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path: Path
) -> Iterator[Installation]:
    with (
        site_at(fresh_amqp_url, shared_rabbitmq, redis_url, tmp_path) as site,
        ExitStack() as stack,
    ):
        yield Installation(site, old_path, stack)


@pytest.mark.parametrize(("gateways", "workers"), [("old", "new"), ("new", "old")])
def test_a_gateway_and_a_worker_of_two_versions_work_together(
    place: Installation, gateways: Version, workers: Version
) -> None:
    gateway = place.start(gateways, "gateway")
    worker = place.start(workers, "worker", "faulty")
    callbacks = place.start(gateways, "callbacks", "--queues", "callbacks")
    ready(gateway, worker, callbacks)
    client = place.client(gateway)

    with Receiver() as receiver:
        artifact = client.submit("faulty", fault="artifact", callback_url=receiver.url, metadata={"n": 1})
        result = client.result(artifact.task_id, wait=SECONDS)
        assert (result.status, result.worker, result.metadata) == ("succeeded", f"{workers}-worker", {"n": 1})
        saved = client.download(artifact.task_id, "note.txt", place.site.folder)
        assert saved.read_text() == "a note"
        eventually(lambda: receiver.got, "the callback", seconds=SECONDS)
    event = receiver.got[0].verify(place.secret)
    assert (event["type"], event["data"]["task_id"]) == ("task.succeeded", artifact.task_id)
    assert event.get("version", 1) == 1

    # What is said explicitly is the same task, whichever of the two reads it, also where it is the default.
    retried = client.submit("faulty", fault="transient", options=place.options("retried", times=1))
    steps = [event.type for event in client.events(retried.task_id)]
    assert steps[-1] == "task.succeeded"
    assert client.result(retried.task_id).attempts == 2
    again = client.submit(
        "faulty", task_id=retried.task_id, fault="transient", time_limit=None, file_url=None,
        options=place.options("retried", times=1, megabytes=0),
    )  # fmt: skip
    assert again.state == "succeeded"
    assert place.started("retried") == 2

    failed = client.submit("faulty", fault="invalid")
    result = client.result(failed.task_id, wait=SECONDS)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.code == "never"
    (letter,) = place.site.dead()
    assert (letter.task_id, letter.reason) == (failed.task_id, "never")

    running = client.submit("faulty", fault="hang", options=place.options("running"))
    eventually(lambda: place.started("running"), "a run to cancel", seconds=SECONDS)
    client.cancel(running.task_id)
    assert client.wait(running.task_id, timeout=SECONDS).state == "cancelled"


def test_this_version_takes_over_what_the_last_one_left(place: Installation) -> None:
    gateway = place.start("old", "gateway")
    worker = place.start("old", "worker", "faulty")
    feeder = place.start("old", "callbacks", "--queues", "batches")
    ready(gateway, worker, feeder)
    client = place.client(gateway)
    receiver = place._stack.enter_context(Receiver())

    # A dead letter, and a callback that nobody has delivered.
    dead = client.submit(
        "faulty", fault="invalid", options=place.options("dead", times=1), callback_url=receiver.url
    )
    assert client.result(dead.task_id, wait=SECONDS).status == "failed"

    # A batch of which some lines are done, one waits for its retry, one runs, some are queued, the rest is
    # not fed.
    gate, lines = place.site.folder / "gate", range(1, 31)
    faults = {6: {"fault": "transient"}, 7: {"fault": "gate"}}
    source = "".join(
        json.dumps(
            {
                "task_type": "faulty",
                "options": place.options(f"line-{line}", times=1 if line == 6 else 10_000, gate=str(gate)),
                **faults.get(line, {}),
            }
        )
        + "\n"
        for line in lines
    )
    batch = client.submit_batch(source.encode(), max_in_flight=4)
    eventually(lambda: place.started("line-7"), "the line that waits", seconds=SECONDS)
    feeder.kill()
    worker.kill()

    # Tasks that are queued, one of them cancelled.
    queued = [
        client.submit("faulty", options=place.options(f"queued-{n}"), priority="high", metadata={"n": n})
        for n in range(2)
    ]
    cancelled = client.submit("faulty", options=place.options("cancelled"))
    client.cancel(cancelled.task_id)
    gateway.kill()
    assert place.started("line-6") == 1
    assert not place.started("line-12")

    gate.touch()
    gateway = place.start("new", "gateway")
    callbacks = place.start("new", "callbacks")
    ready(gateway, callbacks)
    client = place.client(gateway)
    assert [each.batch_id for each in client.batches()] == [batch.batch_id]
    # Before a worker runs: what the last version accepted is the same task to this one, in other words, too.
    again = client.submit(
        "faulty", task_id=queued[0].task_id, fault="none", priority="high", metadata={"n": 0},
        options=place.options("queued-0", times=10_000, megabytes=0),
    )  # fmt: skip
    assert again.state == "queued"
    with pytest.raises(Conflict):
        client.submit("faulty", task_id=queued[0].task_id, fault="error")
    ready(place.start("new", "worker", "faulty"))

    ended = client.wait_batch(batch.batch_id, timeout=SECONDS)
    assert (ended.state, ended.counts.succeeded, ended.counts.total) == ("completed", 30, 30)
    output = [
        json.loads(line)
        for line in client.batch_file(batch.batch_id, "output", place.site.folder / "output.jsonl")
        .read_text()
        .splitlines()
    ]
    assert [entry["line"] for entry in output] == list(lines)
    assert {entry["line"] for entry in output if entry["attempts"] == 2} == {6}
    # The run of line 7 was cut off with its worker; everything else ran as often as it had attempts.
    assert [place.started(f"line-{line}") for line in lines] == [2 if line in {6, 7} else 1 for line in lines]
    for n, task in enumerate(queued):
        result = client.result(task.task_id, wait=SECONDS)
        assert (result.status, result.worker, result.metadata) == ("succeeded", "new-worker", {"n": n})
        assert place.started(f"queued-{n}") == 1
    assert client.wait(cancelled.task_id, timeout=SECONDS).state == "cancelled"
    assert not place.started("cancelled")

    # The callback of the failure arrives, then that of the success after a redrive.
    eventually(lambda: len(receiver.got) == 1, "the callback that was left", seconds=SECONDS)
    shown = inferq(place.env | {"PYTHONPATH": str(PLUGIN)}, "dead", "redrive", "faulty")
    assert shown.returncode == 0, shown.stderr
    eventually(
        lambda: client.result(dead.task_id).status == "succeeded", "the redriven task", seconds=SECONDS
    )
    assert client.result(dead.task_id).redrives == 1
    assert place.started("dead") == 2
    eventually(lambda: len(receiver.got) == 2, "the callback of the redriven task", seconds=SECONDS)
    events = [got.verify(place.secret)["type"] for got in receiver.got]
    assert events == ["task.failed", "task.succeeded"]
    assert place.site.dead() == []
    assert sum(place.site.depth(f"inference.faulty.{lane}") for lane in ("high", "normal", "low")) == 0
