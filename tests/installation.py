"""A gateway and workers as processes, with everything real around them, and the command line to use them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from inferq.consumers.batches.services import load_services
from inferq.producer.cli.main import main
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import free_ports
from tests.conftest import RabbitMQ
from tests.forked import ForkedPart
from tests.logged import log_kept
from tests.waiting import eventually, takes_work


def inferq(
    env: dict[str, str], *arguments: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line, run as a person runs it."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "inferq.producer.cli", *arguments],
        env=env, capture_output=True, text=True, check=False, timeout=240, input=stdin,
    )  # fmt: skip


def inferq_here(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, for tests that are not of the process: one takes a second to start."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    status: object = 0
    load_services.cache_clear()  # a process has one environment; this one has many
    with pytest.MonkeyPatch.context() as patch, log_kept(), redirect_stdout(out), redirect_stderr(err):
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["inferq", *arguments])
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(arguments, int(str(status or 0)), said, complained)


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
            processes.append(ForkedPart(*command, env=env | {"INFERQ_PROBE_PORT": str(probe)}))

        def ready(number: int) -> bool:
            try:
                return takes_work(httpx.get(f"http://127.0.0.1:{number}/readyz", verify=False))
            except httpx.TransportError:
                return False

        eventually(lambda: all(ready(number) for number in ports), "a ready installation", seconds=120)
        yield env
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
        rabbitmq.remove_vhost(vhost)
