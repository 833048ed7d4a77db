"""A worker in a process of its own, as it runs in a container, with everything real around it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pika
import pytest
import redis

from inferq.broker import BrokerSettings, DeadLetter, DeadLetters, connect, topology_for
from inferq.producer.up.part import free_ports
from inferq.schemas import Result, TaskStatus
from inferq.storage import ObjectStore, ResultStore, StatusIndex, StorageSettings, open_store
from tests.conftest import RabbitMQ
from tests.forked import ForkedPart
from tests.waiting import eventually, takes_work

PLUGIN = Path(__file__).parents[1] / "plugin"


def starts(marker: Path) -> int:
    """How often the engine of the test's own type began a run, by the task's marker file."""
    return len(marker.read_text().splitlines()) if marker.exists() else 0


@dataclass
class Site:
    """Where workers work: a virtual host, a Redis database, a folder; and the settings that name them."""

    env: dict[str, str]
    folder: Path
    broker: BrokerSettings
    store: ObjectStore
    results: ResultStore
    status: StatusIndex
    workers: list[WorkerProcess] = field(default_factory=list)
    _declared: bool = False

    def worker(self, type_name: str = "faulty", **settings: str) -> WorkerProcess:
        """Start a worker; returns once it is ready."""
        worker = self.start_worker(type_name, **settings)
        worker.wait_ready()
        return worker

    def start_worker(self, type_name: str = "faulty", **settings: str) -> WorkerProcess:
        worker = WorkerProcess(self, type_name, settings)
        self.workers.append(worker)
        return worker

    def publish(
        self,
        message: dict[str, Any] | bytes,
        *,
        key: str | None = None,
        exchange: str = "inference.tasks",
        headers: dict[str, Any] | None = None,
        declare: bool = True,
    ) -> str:
        """Publish as a producer in any language would; gives the task's id."""
        if isinstance(message, dict):
            message = {"task_id": uuid.uuid4().hex, "task_type": "faulty", **message}
            key = key or f"task_type.{message['task_type']}"
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        connection = connect(self.broker, name="test")
        channel = connection.channel()
        if declare and not self._declared:
            topology_for(["faulty", "echo"]).apply(channel)
            self._declared = True
        channel.confirm_delivery()
        properties = pika.BasicProperties(delivery_mode=2, headers=headers)
        channel.basic_publish(exchange, key or "task_type.faulty", body, properties, mandatory=True)
        connection.close()
        return str(message["task_id"]) if isinstance(message, dict) else ""

    def ended(self, task_id: str) -> Result:
        found = eventually(lambda: self.results.load("default", task_id), f"the end of {task_id}")
        assert isinstance(found, Result)
        return found

    def state(self, task_id: str) -> TaskStatus | None:
        return self.status.get("default", task_id)

    def dead(self, type_name: str = "faulty") -> list[DeadLetter]:
        with DeadLetters(self.broker, type_name) as letters:
            return letters.read()

    def forget(self) -> None:
        """Empty the Redis database."""
        with redis.Redis.from_url(self.env["INFERQ_REDIS_URL"]) as connection:
            connection.flushdb()

    def depth(self, queue: str) -> int:
        connection = connect(self.broker, name="test")
        count = connection.channel().queue_declare(queue, passive=True).method.message_count
        connection.close()
        return int(count)


class WorkerProcess:
    """`inferq worker` as a process."""

    def __init__(self, site: Site, type_name: str, settings: dict[str, str], *, forked: bool = True) -> None:
        self.type_name = type_name
        self.port = free_ports(1)[0]
        self.log = site.folder / f"worker-{uuid.uuid4().hex[:6]}.log"
        env = site.env | {"INFERQ_PROBE_PORT": str(self.port), **settings}
        self.process: ForkedPart | subprocess.Popen[bytes]
        if forked:
            self.process = ForkedPart("worker", type_name, env=env, log=self.log)
        else:
            command = [sys.executable, "-P", "-m", "inferq.producer.cli", "worker", type_name]
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=60, verify=False)

    def ready(self) -> bool:
        """Whether it takes tasks: its engine is loaded, and it waits for no service."""
        try:
            return takes_work(self.get("/readyz"))
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        def ready_or_gone() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.ready()

        eventually(ready_or_gone, "a ready worker")

    def engine_pid(self) -> int:
        return self.engine_pids()[0]

    def engine_pids(self) -> list[int]:
        pids: list[int] = []
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
                pids += map(int, file.read_text().split())
        return pids

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def discard(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class DripServer:
    """An HTTP server that answers one byte at a time, and never comes to the end."""

    def __enter__(self) -> DripServer:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            line, _ = self._listener.accept()
            with line:
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while True:
                    line.sendall(b"x")
                    time.sleep(0.05)


@contextmanager
def site_at(
    amqp_url: str, rabbitmq: RabbitMQ, redis_url: str, folder: Path, *, of: type[Site] = Site
) -> Iterator[Site]:
    # Of a queue's own time to live and a policy's the shorter holds: the first retry comes at once.
    rabbitmq.management.put(
        f"/policies/{amqp_url.rpartition('/')[2]}/hurry",
        json={"pattern": r"^inference\.retry\.", "apply-to": "queues", "definition": {"message-ttl": 400}},
    ).raise_for_status()
    address = urlsplit(redis_url)._replace(path="/7").geturl()
    own = {
        "INFERQ_AMQP_URL": amqp_url,
        "INFERQ_REDIS_URL": address,
        "INFERQ_STORE_URL": (folder / "store").as_uri(),
        "INFERQ_SCRATCH_DIR": str(folder / "scratch"),
        "PYTHONPATH": str(PLUGIN),
    }
    storage = StorageSettings(redis_url=address, store_url=own["INFERQ_STORE_URL"])
    store = open_store(storage)
    place = of(
        env=os.environ | own,
        folder=folder,
        broker=BrokerSettings(amqp_url=amqp_url),
        store=store,
        results=ResultStore(store),
        status=StatusIndex.from_settings(storage),
    )
    yield place
    for worker in place.workers:
        worker.discard()
    place.forget()
    place.status.close()


class SharedSite(Site):
    """A site whose workers stay for the module's other tests: starting one costs more than most tests."""

    def worker(self, type_name: str = "faulty", **settings: str) -> WorkerProcess:
        assert not settings, "a worker with settings of its own needs a site of its own"
        for worker in self.workers:
            if worker.type_name == type_name and worker.process.poll() is None:
                return worker
        return super().worker(type_name)

    def clear(self) -> None:
        """Wait until nothing is in hand, and empty all queues."""
        for worker in self.workers:
            eventually(lambda: "inferq_worker_busy_slots 0.0" in worker.get("/metrics").text)  # noqa: B023
        connection = connect(self.broker, name="test")
        channel = connection.channel()
        for queue in topology_for(["faulty", "echo"]).queues:
            channel.queue_purge(queue.name)
        connection.close()


@pytest.fixture(scope="module")
def shared_site(
    shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    vhost = f"shared-{uuid.uuid4().hex[:12]}"
    amqp_url = shared_rabbitmq.add_vhost(vhost)
    with connect(BrokerSettings(amqp_url=amqp_url), name="test") as connection:
        topology_for(["faulty", "echo"]).apply(connection.channel())
    folder = tmp_path_factory.mktemp("site")
    with site_at(amqp_url, shared_rabbitmq, redis_url, folder, of=SharedSite) as place:
        yield place
    shared_rabbitmq.remove_vhost(vhost)


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Site:
    """A site of the test's own; with the mark `shared` that of its module."""
    if request.node.get_closest_marker("shared") is None:
        own: Site = request.getfixturevalue("own_site")
        return own
    place: SharedSite = request.getfixturevalue("shared_site")
    place.clear()
    return place


@pytest.fixture
def own_site(
    fresh_amqp_url: str, shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path: Path
) -> Iterator[Site]:
    with site_at(fresh_amqp_url, shared_rabbitmq, redis_url, tmp_path) as place:
        yield place
