"""The real gateway, on a free loopback port, in a thread."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferq.broker.messages import Message
from inferq.broker.settings import BrokerSettings
from inferq.producer.gateway.app import create_app
from inferq.producer.gateway.breaker import StoreBreaker
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.server import Server, listen, url_of
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import EndState, ErrorInfo, InferqError, Result, Task, parse_task
from inferq.storage.objects.open import open_store
from inferq.storage.objects.results import ResultStore
from inferq.storage.objects.store import ObjectStore
from inferq.storage.settings import StorageSettings
from inferq.storage.status.index import StatusIndex
from tests.conftest import RabbitMQ
from tests.runs import begin_run

_tenants = (f"tenant-{n}" for n in itertools.count(1))


class FakePublisher:
    """Keeps its messages. Confirms after `delay` seconds; fails with `error` if set."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.error: InferqError | None = None
        self.delay = 0.0
        self.blocked_reason: str | None = None
        self.connected = True

    def start(self) -> None:
        return

    async def confirm(self, message: Message, *, timeout: float | None = None) -> None:
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        self.messages.append(message)

    def close(self, timeout: float = 5.0) -> None:
        return

    def ids(self) -> list[str | None]:
        return [message.message_id for message in self.messages]


@dataclass
class Gateway:
    """A running gateway, its services, and a tenant for one test."""

    url: str
    server: Server
    keys: KeyFile
    store: ObjectStore
    status: StatusIndex
    results: ResultStore
    folder: Path
    tenant: str = ""
    key: str = ""
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = self.client(self.key)

    def someone(self) -> httpx.Client:
        """An HTTP client of another tenant."""
        return self.client(self.keys.add(next(_tenants)))

    def client(self, key: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=False)

    def get_openly(self, url: str, **arguments: Any) -> httpx.Response:
        """GET without a key."""
        with self.client(None) as client:
            return client.get(url, **arguments)

    def task(self, task_id: str, **content: Any) -> Task:
        return parse_task({"task_id": task_id, "task_type": "echo", "tenant": self.tenant, **content})

    def began(self, task_id: str, **content: Any) -> Task:
        task = self.task(task_id, **content)
        begin_run(self.status, task)
        return task

    def end(self, task: Task, status: EndState = "succeeded", *, redis: bool = True, **more: Any) -> Result:
        """Record the end of a task, as a worker does."""
        fields: dict[str, Any] = {"output": {"payload": 1}} if status == "succeeded" else {}
        if status == "failed":
            fields["error"] = ErrorInfo(code="broken", message="it broke", retryable=False)
        fields |= more
        result = Result(
            task_id=task.task_id,
            task_type=task.task_type,
            tenant=task.tenant,
            status=status,
            attempts=1,
            finished_at=datetime.now(UTC),
            digest=task.digest(),
            metadata=task.metadata,
            **fields,
        )
        kept = self.results.save(result)
        if redis:
            self.status.ended(result)
        return kept


@contextmanager
def running(
    folder: Path,
    *,
    redis_url: str,
    publisher: FakePublisher | None = None,
    amqp_url: str | None = None,
    storage: dict[str, Any] | None = None,
    store_breaker: StoreBreaker | None = None,
    **settings: Any,
) -> Iterator[Gateway]:
    """Run a gateway with a folder of its own."""
    listener = listen("127.0.0.1", 0)
    url = url_of(listener)
    given = {
        "store_url": (folder / "store").as_uri(),
        "store_fsync": False,
        "redis_timeout": 0.5,
        "api_url": url,
    }
    stored = StorageSettings(redis_url=redis_url, **{**given, **(storage or {})})
    gateway_settings = GatewaySettings(
        api_keys_file=folder / "keys.json", **{"shutdown_grace": 5, "events_heartbeat": 1.0, **settings}
    )
    broker = BrokerSettings(amqp_url=amqp_url) if amqp_url else None
    app = create_app(
        gateway_settings, storage=stored, broker=broker, publisher=publisher, store_breaker=store_breaker
    )
    server = Server(app, grace=gateway_settings.shutdown_grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    status = StatusIndex.from_settings(stored)
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        store = open_store(stored)
        keys = KeyFile(gateway_settings.api_keys_file)
        gateway = as_new_tenant(Gateway(url, server, keys, store, status, ResultStore(store), folder))
        with gateway.http:
            yield gateway
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the gateway did not stop"
        status.close()


def as_new_tenant(gateway: Gateway) -> Gateway:
    tenant = next(_tenants)
    key = gateway.keys.add(tenant)
    return replace(gateway, tenant=tenant, key=key)


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.01)
    return value


def published(gateway: Gateway) -> list[str | None]:
    """The ids of the messages that the gateway's fake publisher received."""
    fake: FakePublisher = gateway.server.config.app.state.services.publisher  # type: ignore[union-attr]
    return fake.ids()


@pytest.fixture(scope="session")
def openapi_document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document of an application that no server runs and that reaches no Redis."""
    folder = tmp_path_factory.mktemp("openapi")
    stored = StorageSettings(store_url=(folder / "store").as_uri(), redis_url="redis://127.0.0.1:1")
    gateway_settings = GatewaySettings(api_keys_file=folder / "keys.json")
    return create_app(gateway_settings, storage=stored, publisher=FakePublisher()).openapi()


@pytest.fixture(scope="session")
def shared_gateway(
    tmp_path_factory: pytest.TempPathFactory, shared_rabbitmq: RabbitMQ, redis_url: str
) -> Iterator[Gateway]:
    name = "gateway"
    with ExitStack() as stack:
        amqp_url = shared_rabbitmq.add_vhost(name)
        stack.callback(shared_rabbitmq.remove_vhost, name)
        folder = tmp_path_factory.mktemp("gateway")
        gateway = stack.enter_context(running(folder, redis_url=redis_url, amqp_url=amqp_url))
        wait_until(lambda: gateway.http.get("/readyz").status_code == 200)
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Iterator[Gateway]:
    """The gateway with a real broker, Redis and folder store, and a tenant for this test."""
    fresh = as_new_tenant(shared_gateway)
    with fresh.http:
        yield fresh


@pytest.fixture(scope="session")
def shared_publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture(scope="session")
def shared_lone_gateway(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, shared_publisher: FakePublisher
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("lone")
    with running(
        folder, redis_url=redis_url, publisher=shared_publisher, max_upload_bytes=1 << 20
    ) as gateway:
        yield gateway


@pytest.fixture
def publisher(shared_publisher: FakePublisher) -> FakePublisher:
    """The fake publisher of `lone_gateway`, or of a gateway that the test runs itself."""
    FakePublisher.__init__(shared_publisher)
    return shared_publisher


@pytest.fixture
def lone_gateway(shared_lone_gateway: Gateway, publisher: FakePublisher) -> Iterator[Gateway]:
    """A gateway with a fake publisher, and a tenant for this test."""
    fresh = as_new_tenant(shared_lone_gateway)
    with fresh.http:
        yield fresh


@pytest.fixture
def own_gateway(tmp_path: Path, redis_url: str, publisher: FakePublisher) -> Iterator[Gateway]:
    """A gateway for this test alone, which may break it."""
    with running(tmp_path, redis_url=redis_url, publisher=publisher) as gateway:
        yield gateway
