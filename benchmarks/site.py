"""The services that all contestants share: a private RabbitMQ, a private Redis, a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from inferq.broker import BrokerSettings
from inferq.producer.up.part import Part, free_ports
from inferq.producer.up.process import spawn, stop
from inferq.producer.up.rabbitmq import RabbitNode, RabbitPorts
from inferq.producer.up.redis import RedisServer
from inferq.storage import ObjectStore, ResultStore, StorageSettings, open_store

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Site:
    """The addresses of the shared services."""

    folder: Path
    amqp_url: str
    redis_url: str
    store_url: str

    def broker(self) -> BrokerSettings:
        return BrokerSettings(amqp_url=self.amqp_url)

    def store(self) -> ObjectStore:
        return open_store(StorageSettings(store_url=self.store_url, redis_url=self.redis_url))

    def results(self) -> ResultStore:
        return ResultStore(self.store())

    def environment(self, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(HERE / "plugin"), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        return (
            os.environ
            | {
                "PYTHONPATH": path,
                "INFERQ_AMQP_URL": self.amqp_url,
                "INFERQ_REDIS_URL": self.redis_url,
                "INFERQ_STORE_URL": self.store_url,
                "INFERQ_LOG_LEVEL": "WARNING",
                "BENCH_AMQP_URL": self.amqp_url,
                "BENCH_REDIS_URL": self.redis_url,
            }
            | more
        )

    @contextmanager
    def process(self, *argv: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A contestant's process during the block; it is stopped gracefully."""
        log = self.folder / f"{Path(argv[0]).name}-{time.monotonic_ns()}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(argv, env=self.environment(**environment), stdout=out, stderr=out)
        try:
            yield process
            if process.poll() is not None:
                raise RuntimeError(f"{argv} ended early:\n{log.read_text()[-3000:]}")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def inferq_worker(
        self, type_name: str, **settings: str
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        argv = (sys.executable, "-P", "-m", "inferq.producer.cli", "worker", type_name)
        return self.process(*argv, **settings)


_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_stand_in() -> Iterator[str]:
    """The address of a stand-in for S3 during the block. Its credentials are in the environment from now on."""
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    moto = subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{int(moto.stdout.readline())}"  # type: ignore[union-attr]
    finally:
        moto.kill()
        moto.wait()


@contextmanager
def site() -> Iterator[Site]:
    """A site that exists during the block."""
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        node = RabbitNode.prepare(folder / "rabbitmq", RabbitPorts(*free_ports(5)))
        server = RedisServer.prepare(folder / "redis", free_ports(1)[0])
        running: list[tuple[subprocess.Popen[bytes], Part]] = []
        try:
            for part in (*node.parts(), server.part()):
                running.append((spawn(part, folder / f"{part.name}.log"), part))
                wait_until(lambda part=part: part.probe() is None, part.start_limit)
            yield Site(folder, node.url, server.url, (folder / "store").as_uri())
        finally:
            for process, part in reversed(running):
                stop(process, part)


def wait_until(condition: Callable[[], bool], limit: float = 120.0, *, pause: float = 0.02) -> None:
    """Wait for a condition. Raises TimeoutError after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the condition was not met within {limit:g} s")
        time.sleep(pause)
