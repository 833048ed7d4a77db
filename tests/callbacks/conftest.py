"""A receiver over real HTTP, and `inferq callbacks` as it runs in a container, everything else real."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook

from inferq.broker import Publisher, callback_message, connect, job_topology, topology_for
from inferq.consumers.jobs.worker import declare
from inferq.producer.up.part import free_ports
from inferq.schemas import Callback, Event, Result, task_callback
from inferq.storage import CallbackRecords, WebhookSecrets
from tests.conftest import RabbitMQ
from tests.forked import ForkedPart
from tests.waiting import eventually
from tests.worker.conftest import Site, site_at

TENANT = "default"


@dataclass(frozen=True)
class Got:
    """A request that a receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verify(self, secret: str) -> Any:
        return Webhook(secret).verify(self.body, self.headers)


Answer = Callable[[BaseHTTPRequestHandler, int], None]


@dataclass
class Receiver:
    """An HTTP server on loopback; `answer` gets the request and how many came before it."""

    answer: Answer | None = None
    got: list[Got] = field(default_factory=list)
    wrap: Callable[[Any], Any] = lambda line: line

    def __enter__(self) -> Receiver:
        receiver, counter = self, itertools.count()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                number = next(counter)
                receiver.got.append(Got(self.path, headers, body, time.monotonic()))
                with suppress(OSError):
                    (receiver.answer or say(200))(self, number)

            def log_message(self, *_about: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            ended = threading.Event()

            def handle_error(self, *_about: object) -> None:
                return

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.socket = self.wrap(self.server.socket)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.server.shutdown()
        self.server.ended.set()
        self.server.server_close()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


def say(status: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _number: int) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """Each answer once, the last for ever."""
    return lambda handler, number: answers[min(number, len(answers) - 1)](handler, number)


def hang() -> Answer:
    """Give no answer, until the receiver ends."""
    return lambda handler, _number: handler.server.ended.wait()  # type: ignore[attr-defined]


_numbers = itertools.count()


def callback(url: str, name: str | None = None, *, tenant: str = TENANT) -> Callback:
    result = Result(
        task_id=name or f"t{next(_numbers)}",
        task_type="echo",
        tenant=tenant,
        status="succeeded",
        output={"payload": "Grüße 你好"},
        attempts=1,
        finished_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        digest="d",
    )
    return task_callback(Event.of_result(result), url, 0, "d")


class Caller:
    """`inferq callbacks` at a site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.file = site.folder / "secrets.json"
        self.secrets = WebhookSecrets(self.file)
        self.records = CallbackRecords(site.store, site.status)
        self.env = site.env | {
            "INFERQ_WEBHOOK_SECRETS_FILE": str(self.file),
            "INFERQ_CALLBACK_ALLOWED_NETWORKS": "127.0.0.0/8",
            "INFERQ_CALLBACK_SCHEDULE": "0,1,1",
        }
        self.publisher = Publisher(site.broker, name="test", topology=topology_for(["echo"]))
        self.publisher.start()
        self.processes: list[ForkedPart] = []
        self.port = free_ports(1)[0]
        self.log = site.folder / "callbacks.log"

    def start(self, *arguments: str, ready: bool = True, **settings: str) -> ForkedPart:
        env = self.env | {"INFERQ_PROBE_PORT": str(self.port), **settings}
        process = ForkedPart("callbacks", "--queues", "callbacks", *arguments, env=env, log=self.log)
        self.processes.append(process)
        if ready:
            eventually(self.ready, "a ready callbacks process")
        return process

    def ready(self) -> bool:
        assert self.processes[-1].poll() is None, self.log.read_text()
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=60, verify=False)

    def send(self, *callbacks: Callback) -> None:
        """Put callbacks on the queue; returns once the broker has them."""
        for put in [self.publisher.publish(callback_message(each)) for each in callbacks]:
            put.result()

    def record(self, sent: Callback) -> Any:
        found = self.records.indexed(sent.tenant, sent.subject_kind, sent.subject_id)
        return next((record for record in found if record.callback_id == sent.callback_id), None)

    def came_to(self, sent: Callback, state: str) -> Any:
        """The callback's record, once it is in that state."""
        return eventually(
            lambda: (record := self.record(sent)) and record.state == state and record,
            f"{state} callback",
        )

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.publisher.close(0)


@pytest.fixture(scope="package", name="place")
def shared_place(
    shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """What all tests here share, as it takes a while to declare the queues of delayed delivery."""
    url = shared_rabbitmq.add_vhost("callbacks")
    with site_at(url, shared_rabbitmq, redis_url, tmp_path_factory.mktemp("callbacks")) as place:
        declare(place.broker)
        yield place
    shared_rabbitmq.remove_vhost("callbacks")


@pytest.fixture
def site(place: Site) -> Iterator[Site]:
    yield place
    for worker in place.workers:
        worker.discard()
    connection = connect(place.broker, name="test")
    channel = connection.channel()
    for queue in reversed(job_topology().queues):  # the job queues last: they get what was in flight
        channel.queue_purge(queue.name)
    connection.close()
    (place.folder / "secrets.json").unlink(missing_ok=True)
    (place.folder / "callbacks.log").unlink(missing_ok=True)
    place.forget()


@pytest.fixture
def caller(site: Site) -> Iterator[Caller]:
    made = Caller(site)
    made.secrets.rotate(TENANT)
    yield made
    made.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made
