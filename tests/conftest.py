"""A private RabbitMQ and Redis for the tests: on loopback, in a temporary folder, gone when pytest is."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

from inferq.producer.up.part import Part, free_ports
from inferq.producer.up.process import last_lines, spawn, stop
from inferq.producer.up.rabbitmq import USER, RabbitNode, RabbitPorts
from inferq.producer.up.redis import RedisServer
from inferq.storage import ObjectInfo, ObjectStore
from inferq.storage.objects.s3 import s3_client
from tests.logged import log_kept

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        # As after `nohup make test &`. Pytest goes on ignoring it; a handler is not handed down to children.
        signal.signal(_number, lambda *_: None)

# Several tests run at a time: an engine's threads would wait for each other, which costs half as much again.
for _threads in ("INFERQ_OCR_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

# The kernel ends a child when the thread that started it ends, and a test may start one on a short-lived
# thread: this one lives as long as pytest does.
_spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")


_LONGEST = ("worker", "up", "cli", "contract", "ocr")
_STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip every test that starts a process")


# An example takes as long as the machine has other work to do.
settings.register_profile("whole", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("whole"), max_examples=20)


def pytest_configure(config: pytest.Config) -> None:
    """With --quick a test is skipped as soon as it starts a process: RabbitMQ, Redis, S3, or a part of ours."""
    settings.load_profile("quick" if config.getoption("--quick") else "whole")
    if config.getoption("--quick"):

        def skip(event: str, _arguments: object) -> None:
            if event in _STARTS_A_PROCESS and "PYTEST_CURRENT_TEST" in os.environ:
                pytest.skip("starts a process")

        sys.addaudithook(skip)


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    with log_kept():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector off what stays to the end: all tests and the modules that they import."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest: at the end, none is left for one process alone."""
    items.sort(key=lambda item: item.path.parent.name not in _LONGEST)


class Node:
    """Parts that are started and ended together; `url` is where to reach what they serve.

    Data is kept between `stop` or `kill` and `start`, and so are the ports.
    """

    def __init__(self, parts: tuple[Part, ...], logs: Path, url: str) -> None:
        self.parts = parts
        self.url = url
        self._logs = logs
        self._running: dict[str, Popen[bytes]] = {}
        self._lock = threading.RLock()

    def start(self) -> None:
        """Start and wait until everything answers."""
        with self._lock:
            for part in self.parts:
                process = self._running.get(part.name)
                if process is None or process.poll() is not None:
                    self._running[part.name] = _spawner.submit(spawn, part, self._log(part)).result()
                self._wait_ready(part)

    def stop(self) -> None:
        """Stop in good order, the last part first."""
        with self._lock:
            for part in reversed(self.parts):
                if process := self._running.pop(part.name, None):
                    stop(process, part)

    def kill(self) -> None:
        """End it as a power failure would: SIGKILL to the main part, at once."""
        with self._lock:
            part = self.parts[-1]
            if process := self._running.pop(part.name, None):
                process.kill()
                stop(process, part)

    def discard(self) -> None:
        """End everything at once: its data is not needed any more."""
        with self._lock:
            for part in reversed(self.parts):
                if process := self._running.pop(part.name, None):
                    process.kill()
                    stop(process, part)

    def pid(self) -> int:
        """The process id of the main part."""
        return self._running[self.parts[-1].name].pid

    def _log(self, part: Part) -> Path:
        return self._logs / f"{part.name}.log"

    def _wait_ready(self, part: Part) -> None:
        end = time.monotonic() + part.start_limit
        while (reason := part.probe()) is not None:
            process = self._running[part.name]
            if process.poll() is not None or time.monotonic() > end:
                log = "\n".join(last_lines(self._log(part), 20))
                raise RuntimeError(f"{part.name} did not start ({process.poll()}): {reason}\n{log}")
            time.sleep(0.05)


class RabbitMQ(Node):
    """A RabbitMQ node with one user, who may do everything, and an HTTP client for its management API."""

    def __init__(self, folder: Path) -> None:
        self.node = RabbitNode.prepare(folder, RabbitPorts(*free_ports(5)))
        super().__init__(self.node.parts(), folder, self.node.url)
        self.management = httpx.Client(
            base_url=f"{self.node.management_url}/api", auth=(USER, self.node.password), timeout=30
        )

    def kill(self) -> None:
        # RabbitMQ 3.10 brings the names of new quorum queues to disk up to a second late, and never serves
        # those again whose names were lost: publishes to them are refused after a minute.
        time.sleep(1.5)
        super().kill()

    def discard(self) -> None:
        self.management.close()
        super().discard()

    @property
    def port(self) -> int:
        return self.node.ports.amqp

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl on the node, and give what it prints."""
        program = self.node.server.with_name("rabbitmqctl")
        ran = subprocess.run(
            [program, *arguments],
            env=self.parts[-1].env, check=True, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        return ran.stdout

    def add_vhost(self, name: str) -> str:
        """Make a virtual host and give its AMQP URL."""
        self.management.put(f"/vhosts/{name}", json={}).raise_for_status()
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.management.put(f"/permissions/{name}/{USER}", json=everything).raise_for_status()
        return self.node.url_of(name)

    def remove_vhost(self, name: str) -> None:
        self.management.delete(f"/vhosts/{name}").raise_for_status()

    @contextmanager
    def vhost(self, prefix: str) -> Iterator[str]:
        """The AMQP URL of a new virtual host, for as long as the block lasts."""
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        yield self.add_vhost(name)
        self.remove_vhost(name)


class Redis(Node):
    def __init__(self, folder: Path) -> None:
        self.server = RedisServer.prepare(folder, free_ports(1)[0])
        super().__init__((self.server.part(),), folder, self.server.url)

    @property
    def port(self) -> int:
        return self.server.port


def _started(make: Callable[[Path], Node], folder: Path) -> Iterator[Node]:
    node = make(folder)
    try:
        node.start()
        yield node
    finally:
        node.discard()


@pytest.fixture
def keys_listed(monkeypatch: pytest.MonkeyPatch) -> Callable[[ObjectStore], list[str]]:
    """Notes the keys of all objects that a store lists from now on."""

    def watch(store: ObjectStore) -> list[str]:
        keys: list[str] = []
        real = store.list

        def noted(*args: Any, **kwargs: Any) -> Iterator[ObjectInfo]:
            for info in real(*args, **kwargs):
                keys.append(info.key)
                yield info

        monkeypatch.setattr(store, "list", noted)
        return keys

    return watch


@pytest.fixture(scope="session")
def shared_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The node that all tests share: leave it running."""
    yield from _started(RabbitMQ, tmp_path_factory.mktemp("rabbitmq"))


@pytest.fixture(scope="session")
def amqp_url(shared_rabbitmq: RabbitMQ) -> str:
    """The shared node's default virtual host."""
    return shared_rabbitmq.url


@pytest.fixture
def fresh_amqp_url(shared_rabbitmq: RabbitMQ) -> Iterator[str]:
    """A virtual host of the test's own on the shared node."""
    with shared_rabbitmq.vhost("test") as url:
        yield url


@pytest.fixture
def impatient_rabbitmq(shared_rabbitmq: RabbitMQ) -> Iterator[Node]:
    """The shared node. Before 4.3 it closes channels opened now on which a delivery is held for over a second."""

    def limit(**milliseconds: int) -> None:
        code = [f"application:set_env(rabbit, {name}, {limit})" for name, limit in milliseconds.items()]
        shared_rabbitmq.control("eval", ", ".join(code) + ".")

    limit(consumer_timeout=1000, channel_tick_interval=300)
    yield shared_rabbitmq
    limit(consumer_timeout=172_800_000, channel_tick_interval=60_000)


@pytest.fixture
def rabbit_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node of the test's own, to stop, kill and start again: takes seconds, so only where needed."""
    yield from _started(RabbitMQ, tmp_path_factory.mktemp("rabbit-node"))


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The server that all tests share: leave it running."""
    yield from _started(Redis, tmp_path_factory.mktemp("redis"))


@pytest.fixture(scope="session")
def redis_url(shared_redis: Redis) -> str:
    """Database 0 of the shared server."""
    return shared_redis.url


@pytest.fixture
def redis_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A server of the test's own, to stop, kill and start again."""
    yield from _started(Redis, tmp_path_factory.mktemp("redis-node"))


_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """S3 over real HTTP; it ends with the pipe to it, however pytest ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session", autouse=True)
def aws() -> Iterator[None]:
    """Credentials for every test, whichever ran before it on the same worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        yield


@pytest.fixture(scope="session")
def s3(s3_url: str, aws: None) -> Iterator[S3Client]:
    client = s3_client(s3_url)
    yield client
    client.close()


_buckets = itertools.count()


@pytest.fixture
def bucket(s3: S3Client) -> str:
    name = f"bucket-{next(_buckets)}"
    s3.create_bucket(Bucket=name)
    return name


class _Forbids(BaseHTTPRequestHandler):
    """S3 to which these credentials are known, and may do nothing."""

    def do_GET(self) -> None:
        body = (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        )
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_arguments: object) -> None:
        return


@pytest.fixture
def forbidding_s3(aws: None) -> Iterator[str]:
    """The URL of an S3 that answers 403 AccessDenied to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbids)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
