"""One scenario's site: its workers, its sender, what they depend on, and the ledger of what they did."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Literal

import httpx
import psutil
import redis
from pika.exceptions import AMQPError

from inferq.broker import (
    BrokerSettings,
    BrokerUnavailable,
    DeadLetters,
    Message,
    Publisher,
    connect,
    dead_queue,
    topology_for,
)
from inferq.producer.batch.start import start
from inferq.producer.cli.listener import Heard, Listener
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import Part, free_ports
from inferq.producer.up.redis import RedisServer
from inferq.schemas import END_STATES, Batch
from inferq.storage import BatchStore, ObjectStore, StorageSettings, WebhookSecrets, open_store
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.s3 import s3_client
from tests.chaos import plan, s3, sender
from tests.chaos.broker import Broker, ports_of, through
from tests.chaos.ledger import Ledger
from tests.chaos.plan import PlannedTask
from tests.chaos.processes import Crew, Kept, Process
from tests.chaos.records import Asker, EventWatch, FolderWatch, Watcher, note_record
from tests.proxy import TcpProxy
from tests.waiting import eventually, takes_work

HERE = Path(__file__).parent
STORES = Literal["folder", "s3"]
INPUTS = Literal["inferq", "s3"]

_STUCK_SECONDS = 20.0
"""With empty queues and no task ending for so long, nothing more will come."""

_GONE_SECONDS = 10.0
"""How long what an engine started may outlive it."""

_REPAIR_SECONDS = 10.0
"""How long the gateway may still call a task unfinished that has ended."""


class Ground:
    """What all scenarios of a run stand on: a broker, a Redis, an S3 service, a folder."""

    def __init__(self, crew: Crew, folder: Path, broker: Broker) -> None:
        self.crew = crew
        self.folder = folder
        self.broker = broker
        self._redis = RedisServer.prepare(folder / "redis", free_ports(1)[0])
        self.redis_url = self._redis.url
        self._redis_process: Process | None = None
        part, self.s3_port = s3.moto()
        self._s3 = crew.start(part)
        self.start_redis()
        broker.start()
        self._s3.wait_ready()
        for bucket in (s3.BUCKET, s3.INPUTS):
            s3_client(self.s3_url).create_bucket(Bucket=bucket)

    @property
    def s3_url(self) -> str:
        return f"http://127.0.0.1:{self.s3_port}"

    def start_redis(self) -> None:
        self._redis_process = self.crew.start(self._redis.part())
        self._redis_process.wait_ready()

    def kill_redis(self) -> None:
        assert self._redis_process is not None
        self._redis_process.kill()

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis_url) as connection:
            connection.flushall()

    def ask_redis(self, *command: str) -> None:
        with redis.Redis.from_url(self.redis_url) as connection:
            connection.execute_command(*command)


@dataclass(frozen=True)
class Needs:
    """What a scenario needs of its site.

    `gateway`: the tasks are submitted there, and it is asked about them. `inputs`: each task has an input, by a URL
    of one of these schemes. `batch`: lines of a batch that is fed beside the other tasks. `batches`: the process
    that feeds batches runs. `dropping`: RabbitMQ may drop any task. `helpers`: engines start programs and daemons.
    `batch_size`: how many tasks an engine computes together. `ahead`: whether workers take tasks ahead.
    """

    workers: int = 2
    slots: int = 1
    store: STORES = "folder"
    proxied: bool = False
    callbacks: bool = False
    gateway: bool = False
    inputs: tuple[INPUTS, ...] = ()
    batch: int = 0
    batches: bool = False
    dropping: bool = False
    helpers: bool = False
    batch_size: int = 1
    ahead: bool = False


class Site:
    """One scenario's workers at work. Use as a context manager: it ends everything that it started."""

    def __init__(
        self,
        name: str,
        ground: Ground,
        needs: Needs,
        tasks: list[PlannedTask],
        seconds: float,
        random: Random,
        *,
        quick: bool,
    ) -> None:
        self.name = name
        self.ground = ground
        self.broker = ground.broker
        self.random = random
        self.tasks = {
            task.id: replace(
                task,
                callback=needs.callbacks,
                helpers=needs.helpers,
                droppable=needs.dropping or task.trouble == "expiring",
                # A copy that is dropped while another one runs fails its task, which then succeeds.
                copies=1 if needs.dropping else task.copies,
            )
            for task in tasks
        }
        self.vhost = f"{name}-{secrets.token_hex(3)}"
        self.folder = ground.folder / self.vhost
        self.folder.mkdir()
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        self.quick = quick
        self.problems: list[str] = []
        self.figures: dict[str, list[float]] = {}
        self._seconds = seconds
        self._needs = needs
        self._watchers: list[Watcher] = []
        self._began = 0.0

    def __enter__(self) -> Site:
        self.ground.flush_redis()
        self._topology = topology_for(["witness"])
        self.broker.add_vhost(self.vhost, self._topology)
        self.amqp_url = self.broker.url(self.vhost)
        self.proxies: list[TcpProxy] = []
        clients_url = self.amqp_url
        if self._needs.proxied:
            ports = ports_of(self.amqp_url)
            self.proxies = [TcpProxy(port) for port in ports]
            by_port = {port: proxy.port for port, proxy in zip(ports, self.proxies, strict=True)}
            clients_url = through(self.amqp_url, by_port)
        self.s3 = s3.FaultyS3(self.ground.s3_port, self.ledger)
        store_url, self.store = self._open_store()
        self._add_inputs()
        self._watchers.append(EventWatch(self.ledger, self.ground.redis_url))
        if self._needs.store == "folder":
            self._watchers.append(FolderWatch(self.ledger, self.folder / "store"))
        for watcher in self._watchers:
            watcher.start()
        self._env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE / "plugin"), str(HERE.parents[1])]),
            "INFERQ_AMQP_URL": clients_url,
            "INFERQ_AMQP_HEARTBEAT": "5",
            "INFERQ_REDIS_URL": self.ground.redis_url,
            "INFERQ_STORE_URL": store_url,
            "INFERQ_S3_ENDPOINT_URL": self.s3.url,
            "INFERQ_FETCH_S3_BUCKETS": s3.INPUTS,
            "INFERQ_SCRATCH_DIR": str(self.folder),
            "INFERQ_GRACE_SECONDS": "10",
            "INFERQ_SLOTS": str(self._needs.slots),
            "INFERQ_TAKE_AHEAD": str(self._needs.ahead).lower(),
            "WITNESS_BATCH_SIZE": str(self._needs.batch_size),
            "WITNESS_LEDGER": str(self.ledger.path),
        }
        self.workers = [
            self.keep(f"worker-{n}", "worker", "witness", INFERQ_WORKER_NAME=f"worker-{n}")
            for n in range(self._needs.workers)
        ]
        self.others: list[Kept] = []
        self.callbacks: Kept | None = None
        if self._needs.callbacks:
            self._listen()
        self.batches: Kept | None = None
        if self._needs.batches or self._needs.batch:
            self.batches = self.keep(
                "batches", "callbacks", "--queues", "batches", INFERQ_BATCH_SLICE="2", INFERQ_BATCH_DOUBT="3"
            )
            self.others.append(self.batches)
        self.gateway: httpx.Client | None = None
        if self._needs.gateway:
            self._serve()
        self.sender: Kept | None = None
        return self

    @property
    def parts(self) -> list[Kept]:
        """Everything of inferq that runs here."""
        return [*self.workers, *([self.callbacks] if self.callbacks else []), *self.others]

    def keep(self, name: str, *command: str, program: str = "inferq.producer.cli", **settings: str) -> Kept:
        """Start a part of inferq, and keep it."""
        (port,) = free_ports(1)
        part = Part(
            name=f"{self.vhost}-{name}",
            argv=(sys.executable, "-P", "-m", program, *command),
            env=self._env | {"INFERQ_PROBE_PORT": str(port), "INFERQ_GATEWAY_PORT": str(port)} | settings,
            probe=lambda: _not_ready(port),
        )
        return Kept(self.ground.crew, part)

    def _serve(self) -> None:
        """Start a gateway, and somebody who asks it about accepted tasks."""
        keys = self.folder / "api-keys.json"
        headers = {"Authorization": f"Bearer {(key := KeyFile(keys).add('default'))}"}
        served = self.keep("gateway", "gateway", INFERQ_API_KEYS_FILE=str(keys))
        self.others.append(served)
        url = f"http://127.0.0.1:{served.part.env['INFERQ_GATEWAY_PORT']}"
        self._env |= {sender.GATEWAY_URL: url, "INFERQ_API_KEY": key}
        self.gateway = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)
        asking = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)
        asker = Asker(self.ledger, asking, self.tasks)
        self._watchers.append(asker)
        asker.start()

    def _add_inputs(self) -> None:
        """Give each task an input."""
        client = s3_client(self.ground.s3_url)
        for number, task in enumerate([*self.tasks.values()] if self._needs.inputs else []):
            name, text = f"{self.vhost}-{number}", f"the input of {task.id}".encode()
            scheme = self._needs.inputs[number % len(self._needs.inputs)]
            if scheme == "inferq":
                self.store.put(upload_key("default", name), text)
            else:
                client.put_object(Bucket=s3.INPUTS, Key=name, Body=text)
            url = f"inferq:{name}" if scheme == "inferq" else f"s3://{s3.INPUTS}/{name}"
            self.tasks[task.id] = replace(task, input_url=url)

    def _listen(self) -> None:
        """Start the delivery of callbacks, and receive them."""
        file = self.folder / "webhook-secrets.json"
        secrets = WebhookSecrets(file)
        secrets.rotate("default")

        def heard(call: Heard) -> None:
            if call.verified and call.type.removeprefix("task.") in END_STATES:
                self.ledger.note("callback", call.subject_id, run=call.webhook_id, what=call.type)
            else:
                self.problems.append(f"a callback of {call.subject_id} is not right: {call}")

        self._listener = Listener(heard, secrets=lambda: secrets.of("default"))
        threading.Thread(target=self._listener.serve, daemon=True).start()
        self._env |= {
            sender.CALLBACK_URL: self._listener.url,
            "INFERQ_WEBHOOK_SECRETS_FILE": str(file),
            "INFERQ_CALLBACK_ALLOWED_NETWORKS": "127.0.0.0/8",
            "INFERQ_CALLBACK_SCHEDULE": "0,1,1,2,5,10",
        }
        self.callbacks = self.keep("callbacks", "callbacks", "--queues", "callbacks")

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        for kept in [*([self.sender] if self.sender else []), *self.workers]:
            kept.stop(hurry=kind is not None)
        for other in self.others:
            other.stop(hurry=kind is not None)
        if self.callbacks is not None:
            self.callbacks.stop(hurry=kind is not None)
            self._listener.close()
        self._stop_watching()
        if self.gateway is not None:
            self.gateway.close()
        self.s3.close()
        for proxy in self.proxies:
            proxy.close()
        with suppress(httpx.HTTPError):
            self.broker.remove_vhost(self.vhost)
        self.ledger.close()

    def _open_store(self) -> tuple[str, ObjectStore]:
        """The store's URL for the workers, and the store itself for us, past all faults."""
        url = (self.folder / "store").as_uri()
        if self._needs.store == "s3":
            url = f"s3://{s3.BUCKET}/{self.vhost}"
        return url, open_store(StorageSettings(store_url=url, s3_endpoint_url=self.ground.s3_url))

    # The run.

    def send(self) -> None:
        """Start the sender: the tasks fall due from now on."""
        file = self.folder / "plan.jsonl"
        plan.write(file, [task for task in self.tasks.values() if not task.line])
        self._began = time.time()
        part = Part(
            name=f"{self.vhost}-sender",
            argv=(
                sys.executable, "-m", "tests.chaos.sender",
                str(file), str(self.ledger.path), str(self._began),
            ),
            env=self._env,
            probe=lambda: None,
        )  # fmt: skip
        self.sender = Kept(self.ground.crew, part, until_success=True)
        if self._needs.batch:
            self._start_batch()

    def _start_batch(self) -> None:
        """Start a batch, whose lines are tasks that are confirmed with it."""
        name = f"{self.name}-batch"
        lines = [PlannedTask(f"{name}.{n}", seconds=0.1, line=True) for n in range(1, self._needs.batch + 1)]
        text = "".join(line.line_of_batch() for line in lines)
        self.store.put(upload_key("default", name), text.encode())
        batch = Batch(batch_id=name, source=f"inferq:{name}", max_in_flight=8, created_at=datetime.now(UTC))
        self.expect(lines)
        publisher = Publisher(BrokerSettings(amqp_url=self.amqp_url), name="chaos")
        publisher.start()

        def publish(message: Message) -> None:
            publisher.publish(message).result()

        start(batch, BatchStore(self.store), publish)
        publisher.close()

    def put_source(self, lines: Sequence[PlannedTask]) -> str:
        """Put the lines of nightly runs into the bucket of inputs, and give their URL."""
        key, text = f"{self.vhost}.jsonl", "".join(line.line_of_batch() for line in lines)
        s3_client(self.ground.s3_url).put_object(Bucket=s3.INPUTS, Key=key, Body=text.encode())
        return f"s3://{s3.INPUTS}/{key}"

    def expect(self, tasks: Sequence[PlannedTask]) -> None:
        """Plan tasks that others than the sender submit, and for whose end somebody has answered."""
        for task in tasks:
            if task.id in self.tasks:
                continue
            self.tasks[task.id] = task
            self.ledger.note("sent", task.id)
            self.ledger.note("confirmed", task.id)

    def moments(self, every: float) -> Iterator[None]:
        """Comes back about every so many seconds, until the time of the scenario is over."""
        while time.time() < self._began + self._seconds:
            time.sleep(every * self.random.uniform(0.6, 1.4))
            yield

    @contextmanager
    def fault(self, what: str) -> Iterator[None]:
        """Enter a fault into the ledger, and its end."""
        name = secrets.token_hex(4)
        self.ledger.note("fault", run=name, what=what)
        yield
        self.ledger.note("mended", run=name, what=what)

    def kill(self, kept: Kept, what: str) -> None:
        with self.fault(f"{what} killed"):
            kept.kill()

    # The end.

    def ended(self) -> set[str]:
        """The tasks that have a record, as far as it was seen."""
        return {entry.task for entry in self.ledger.read() if entry.kind in ("result", "failure")}

    def settle(self, limit: float) -> None:
        """Wait until all tasks are confirmed and ended and the queues empty, or none ends for `limit` seconds.

        A busy machine may take as long as it needs.
        """
        count, since = -1, time.monotonic()
        while time.monotonic() < since + limit:
            ended = len(self.ended() & self.tasks.keys())
            if ended != count:
                count, since = ended, time.monotonic()
            empty = not any(self._depths().values())
            sent = self.sender is None or self.sender.succeeded
            if empty and sent and ended == len(self.tasks) and self._called_back() and self._batch_ended():
                return
            if empty and sent and time.monotonic() > since + _STUCK_SECONDS:
                break
            time.sleep(0.2)

    def _called_back(self) -> bool:
        """Whether everybody was called back who is to be."""
        called = {entry.task for entry in self.ledger.read() if entry.kind == "callback"}
        return all(task.id in called for task in self.tasks.values() if task.callback)

    def _batch_ended(self) -> bool:
        summary = None
        if self._needs.batch:
            summary = BatchStore(self.store).summary("default", f"{self.name}-batch")
        return not self._needs.batch or summary is not None

    def _check_batch(self) -> None:
        summary = BatchStore(self.store).summary("default", f"{self.name}-batch")
        if summary is None:
            self.problems.append("the batch never ended")
        elif summary.state != "completed" or summary.counts.succeeded != self._needs.batch:
            self.problems.append(f"the batch ended otherwise than it had to: {summary}")

    def _ask_for_all(self) -> None:
        """The gateway has to know of each task that ended that it did."""
        left = self.ended()

        def known() -> bool:
            left.difference_update([task for task in sorted(left) if self._state(task) in END_STATES])
            return not left

        try:
            eventually(known, "all ends known to the gateway", seconds=_REPAIR_SECONDS)
        except TimeoutError:
            task = min(left)
            self.problems.append(
                f"the gateway calls {len(left)} tasks unfinished that have ended: {task} is {self._state(task)}"
            )

    def _state(self, task: str) -> str:
        assert self.gateway is not None
        answer = self.gateway.get(f"/v1/tasks/{task}")
        return str(answer.json()["state"]) if answer.status_code == 200 else f"answered {answer.status_code}"

    def orphans(self) -> list[int]:
        """The living processes that engines started which have ended."""
        helpers = [entry for entry in self.ledger.read() if entry.kind == "helper"]
        return [int(e.what) for e in helpers if _lives(e.what, e.at) and not _lives(e.content, e.at)]

    def await_end_of_orphans(self) -> None:
        """Whatever engines started has to end with them."""
        try:
            eventually(lambda: not self.orphans(), "the end of what engines started", seconds=_GONE_SECONDS)
        except TimeoutError:
            self.problems.append(f"{len(self.orphans())} processes outlive the engines that started them")
            for pid in self.orphans():
                with suppress(psutil.Error):
                    psutil.Process(pid).kill()

    def close_books(self) -> None:
        """Stop everybody in good order, and enter what stands in the store and among the dead letters."""
        if self._needs.batch:
            self._check_batch()
        if self.gateway is not None:
            self._ask_for_all()
        if self.sender is not None:
            self.sender.stop()
        for worker in self.workers:
            worker.stop()
        self.await_end_of_orphans()
        self._stop_watching()
        for info in self.store.list("tasks/default/"):
            note_record(self.ledger, info.key, self.store.get(info.key), seen_by="the end")
        settings = BrokerSettings(amqp_url=self.amqp_url)
        with DeadLetters(settings, "witness") as letters:
            for letter in letters.read():
                self.ledger.note("dead", letter.task_id or "?", what=letter.reason)
        for queue, count in self._depths().items():
            if count:
                self.problems.append(f"{count} messages are left in queue {queue}")
        if missing := len(self.tasks.keys() - self.ledger.confirmed()):
            self.problems.append(f"{missing} tasks were never confirmed")

    def _stop_watching(self) -> None:
        while self._watchers:
            self._watchers.pop().stop()

    def _depths(self) -> dict[str, int]:
        """How many messages wait in each queue but that of the dead letters."""
        names = [queue.name for queue in self._topology.queues if queue.name != dead_queue("witness")]
        try:
            connection = connect(BrokerSettings(amqp_url=self.amqp_url), name="chaos")
            channel = connection.channel()
            depths = {n: channel.queue_declare(n, passive=True).method.message_count or 0 for n in names}
            connection.close()
        except (BrokerUnavailable, AMQPError) as error:
            return {f"(cannot be asked: {error})": 1}
        return depths


def _lives(pid: str, at: float) -> bool:
    """Whether the process runs that had this id at this time; one that nobody has reaped counts."""
    with suppress(psutil.Error):
        return psutil.Process(int(pid)).create_time() <= at + 1.0
    return False


def _not_ready(port: int) -> str | None:
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, verify=False)
    except httpx.HTTPError as error:
        return str(error)
    return None if takes_work(answer) else answer.text
