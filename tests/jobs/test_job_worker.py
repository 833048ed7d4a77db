"""Jobs on a real RabbitMQ: sent by our publisher, worked on by Celery, delayed and retried by the broker."""

from __future__ import annotations

import itertools
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from celery import Task

from inferq.broker import (
    JOB_QUEUES,
    QUEUE_JOBS,
    BrokerSettings,
    JobQueue,
    Message,
    Publisher,
    connect,
    job_message,
    topology_for,
)
from inferq.broker.celery_app import celery_app
from inferq.consumers.jobs.worker import Consuming, application, work
from inferq.consumers.probes.settings import ProbeSettings
from inferq.schemas import InstallationError, Outage
from inferq.schemas.errors import EXIT_CONFIG
from tests.celery_worker import working
from tests.certificates import certificate
from tests.conftest import RabbitMQ
from tests.forked import ForkedPart
from tests.installation import inferq_here
from tests.waiting import eventually


@pytest.fixture
def settings(fresh_amqp_url: str) -> BrokerSettings:
    return BrokerSettings(amqp_url=fresh_amqp_url)


@pytest.fixture
def publisher(settings: BrokerSettings) -> Iterator[Publisher]:
    publisher = Publisher(settings, name="test", topology=topology_for(["echo"]))
    publisher.start()
    yield publisher
    publisher.close()


def nothing() -> None:
    return


def test_a_job_of_our_publisher_reaches_celery(settings: BrokerSettings, publisher: Publisher) -> None:
    app = celery_app(settings)
    got: list[tuple[str, str, int]] = []

    @app.task(name="test.note", bind=True, shared=False)
    def note(self: Task, text: str) -> None:
        got.append((text, self.request.id, self.request.retries))

    publisher.publish(
        job_message("test.note", "inference.callbacks", {"text": "Grüße 你好"}, job_id="job-1", retries=2)
    ).result()
    with working(app):
        eventually(lambda: got)
    assert got == [("Grüße 你好", "job-1", 2)]


def test_what_cannot_be_done_is_kept_where_an_operator_sees_it(
    settings: BrokerSettings, publisher: Publisher
) -> None:
    """Unknown, wrong arguments, an error of its own, no JSON, no job at all; what comes behind is done."""
    app = celery_app(settings)
    done = threading.Event()

    @app.task(name="test.done", shared=False)
    def be_done() -> None:
        done.set()

    @app.task(name="test.picky", shared=False)
    def picky(text: str) -> None:
        raise ValueError(text)

    bad = [
        job_message("test.unknown", "inference.batches", {}, job_id="unknown"),
        job_message("test.unknown", "inference.callbacks", {}, job_id="unknown too"),
        job_message("test.picky", "inference.batches", {"wrong": 1}, job_id="wrong"),
        job_message("test.picky", "inference.batches", {"text": "no"}, job_id="fails"),
        job_message("test.picky", "inference.batches", {}, job_id="not JSON")._replace(body=b"{"),
        Message("inference.jobs", "inference.batches", b"{", {"id": "no job"}, "no job", None),
    ]
    publisher.publish_all([*bad, job_message("test.done", "inference.batches", {}, job_id="done")]).result()
    connection = connect(settings, name="test")
    channel = connection.channel()
    kept: dict[str, str] = {}

    def all_kept() -> bool:
        method, properties, _ = channel.basic_get("inference.unroutable", auto_ack=True)
        if method is not None and properties is not None and properties.headers is not None:
            kept[properties.headers["id"]] = method.routing_key
        return len(kept) == len(bad)

    with working(app):
        assert done.wait(60)
        eventually(all_kept)
    connection.close()
    assert kept == {message.headers["id"]: message.routing_key for message in bad}


@pytest.mark.parametrize(("queue", "name"), [(q, n) for q, names in QUEUE_JOBS.items() for n in names])
def test_a_process_that_lacks_a_job_of_its_queues_does_not_start(queue: JobQueue, name: str) -> None:
    settings = BrokerSettings()
    app = celery_app(settings)
    for other in itertools.chain.from_iterable(QUEUE_JOBS.values()):
        if other != name:
            app.task(name=other, shared=False)(nothing)
    with pytest.raises(InstallationError, match=name):
        work(app, [queue], threads=1, broker=settings, probes=ProbeSettings())


@pytest.mark.parametrize(("queues", "status"), [("batches", 1), ("callbacks", 0)])
def test_a_process_that_feeds_batches_does_not_start_without_a_temporary_directory(
    queues: str, status: int
) -> None:
    inferq = [sys.executable, "-P", "-m", "inferq.producer.cli", "callbacks", "--check", "--queues", queues]
    # With `ulimit -f 0` nobody can write a file, not even root.
    ended = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 0 && exec "$@"', "sh", *inferq],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    assert ("set TMPDIR" in ended.stderr) == bool(status)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("INFERQ_BATCH_SLICE", "nan"), ("INFERQ_BATCH_SLICE", "-1"), ("INFERQ_BATCH_DOUBT", "inf"),
        ("INFERQ_BATCH_READERS", "0"), ("INFERQ_BATCH_LEASE", "0"), ("INFERQ_STATUS_RETENTION", "nan"),
        ("INFERQ_STORE_URL", "nowhere"), ("INFERQ_REDIS_URL", "nowhere"),
    ],
)  # fmt: skip
def test_a_process_with_a_setting_that_its_jobs_cannot_use_does_not_start(
    setting: str, value: str, tmp_path: Path
) -> None:
    env = {"INFERQ_AMQP_URL": "amqp://guest:guest@127.0.0.1:1", setting: value}
    checked = inferq_here(env, "callbacks", "--queues", "batches", "--check")
    assert (checked.returncode, setting in checked.stderr) == (EXIT_CONFIG, True), checked.stderr
    process = ForkedPart("callbacks", "--queues", "batches", env=os.environ | env, log=tmp_path / "log")
    ended, log = process.wait(60), (tmp_path / "log").read_text()
    assert (ended, setting in log) == (EXIT_CONFIG, True), log


def test_the_installed_jobs_are_those_of_the_queues() -> None:
    installed = {name for name in application(BrokerSettings()).tasks if not name.startswith("celery.")}
    assert installed == set(itertools.chain.from_iterable(QUEUE_JOBS.values()))


def test_celery_connects_with_the_heartbeat_and_the_timeout_of_the_settings() -> None:
    app = celery_app(BrokerSettings(amqp_heartbeat=7, amqp_connect_timeout=3))
    assert (app.conf.broker_heartbeat, app.connection_for_read().connect_timeout) == (7, 3)


def test_celery_and_the_topology_declare_the_same_queues(settings: BrokerSettings) -> None:
    app = celery_app(settings)
    with app.connection_for_write() as connection, connection.channel() as channel:
        for queue in app.amqp.queues.values():
            queue.bind(channel).declare()
    connection = connect(settings, name="test")
    missing = [str(d) for d in topology_for([]).differences(connection)]
    connection.close()
    assert not [line for line in missing if "jobs" in line or any(name in line for name in JOB_QUEUES)]


def test_a_worker_has_only_queues_that_are_durable_and_quorum(
    settings: BrokerSettings, shared_rabbitmq: RabbitMQ
) -> None:
    virtual_host = urlsplit(settings.amqp_url).path.removeprefix("/")
    with working(celery_app(settings)):
        listed = shared_rabbitmq.control(
            "list_queues", "--silent", "-p", virtual_host, "durable", "type", "name"
        )
    queues = listed.splitlines()
    assert any(JOB_QUEUES[0] in queue for queue in queues)
    assert [queue for queue in queues if "true" not in queue or "quorum" not in queue] == []


def test_a_job_that_outlasts_the_brokers_patience_is_done_and_the_worker_goes_on(
    settings: BrokerSettings, publisher: Publisher, impatient_rabbitmq: RabbitMQ
) -> None:
    app = celery_app(settings)
    began: list[float] = []
    ended: list[float] = []

    @app.task(name="test.long", shared=False)
    def long() -> None:
        began.append(time.monotonic())
        if len(began) == 1:
            time.sleep(3)
        ended.append(time.monotonic())

    @app.task(name="test.next", shared=False)
    def following() -> None:
        done.set()

    done = threading.Event()
    publisher.publish(job_message("test.long", "inference.batches", {}, job_id="long")).result()
    with working(app):
        # The broker hands it out again meanwhile, which ends as soon as it finds the work done.
        eventually(lambda: ended and len(ended) == len(began) and ended[-1] - began[0] > 2.5)
        publisher.publish(job_message("test.next", "inference.batches", {}, job_id="next")).result()
        assert done.wait(60)


@dataclass
class TlsNode:
    """A node that does no more than the handshake; `names` has what the clients that trusted it asked for."""

    context: ssl.SSLContext
    names: list[str | None] = field(default_factory=list)

    def __enter__(self) -> TlsNode:
        def told(_socket: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
            self._name = name

        self.context.sni_callback = told
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._listening.accept()
                with suppress(OSError), self.context.wrap_socket(line, server_side=True):
                    self.names.append(self._name)


def test_celery_checks_each_node_of_the_broker_by_its_own_name(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path, "localhost")
    with TlsNode(context) as node:

        def connections(*hosts: str) -> list[Exception]:
            """What comes of connecting to one after the other, as Celery does."""
            urls = ",".join(f"amqps://guest:guest@{host}:{node.port}" for host in hosts)
            app = celery_app(BrokerSettings(amqp_url=urls, amqp_ca_file=tmp_path / "localhost.pem"))
            connection = app.connection_for_write()
            errors: list[Exception] = []
            for _ in range(2 * len(hosts)):
                try:
                    connection.transport.establish_connection()
                except OSError as error:  # it is no broker in any case
                    errors.append(error)
                connection.maybe_switch_next()
            return errors

        def refused(errors: list[Exception]) -> list[bool]:
            return [isinstance(error, ssl.SSLCertVerificationError) for error in errors]

        assert refused(connections("localhost")) == [False, False]
        eventually(lambda: node.names == ["localhost"] * 2)
        assert refused(connections("127.0.0.1")) == [True, True]
        assert refused(connections("127.0.0.1", "localhost")) == [True, False, True, False]
        assert refused(connections("localhost", "127.0.0.1")) == [False, True, False, True]
        eventually(lambda: node.names == ["localhost"] * 6)


def test_batches_are_not_ready_while_a_service_that_they_need_refuses() -> None:
    def refuse() -> None:
        raise Outage("Redis refuses writes")

    found = Consuming({"Redis": refuse}).readiness()
    assert (found.ready, found.waiting_for) == (False, ("RabbitMQ", "Redis: Redis refuses writes"))
