"""A gateway and workers as processes, with everything real around them, and the command line to use them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from producer.keys import KeyFile
from producer.up.part import free_ports
from tests.conftest import RabbitMQ
from tests.worker.conftest import eventually


def inferq(
    env: dict[str, str], *arguments: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line, run as a person runs it."""
    return subprocess.run(
        [sys.executable, "-m", "producer.cli", *arguments],
        env=env, capture_output=True, text=True, check=False, timeout=60, input=stdin,
    )  # fmt: skip


@contextmanager
def installation(
    rabbitmq: RabbitMQ, redis_url: str, folder: Path, *types: str, **settings: str
) -> Iterator[dict[str, str]]:
    """A gateway and a worker for each type; gives the environment that names them, `settings` included."""
    vhost = f"{folder.name}-{os.getpid()}"
    port, *probes = free_ports(1 + len(types))
    keys = KeyFile(folder / "keys.json")
    env = os.environ | {
        "INFERQ_AMQP_URL": rabbitmq.add_vhost(vhost),
        "INFERQ_REDIS_URL": urlsplit(redis_url)._replace(path="/8").geturl(),
        "INFERQ_STORE_URL": (folder / "store").as_uri(),
        "INFERQ_API_URL": f"http://127.0.0.1:{port}",
        "INFERQ_API_KEYS_FILE": str(folder / "keys.json"),
        "INFERQ_API_KEY": keys.add("default"),
        "COLUMNS": "200",
        **settings,
    }
    commands = [["gateway", "--host", "127.0.0.1", "--port", str(port)], *(["worker", t] for t in types)]
    ports = [port, *probes]
    processes = []
    try:
        for command, probe in zip(commands, ports, strict=True):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "producer.cli", *command],
                    env=env | {"INFERQ_PROBE_PORT": str(probe)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )

        def ready(number: int) -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{number}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(lambda: all(ready(number) for number in ports), 60, "a ready installation")
        yield env
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
        rabbitmq.remove_vhost(vhost)
