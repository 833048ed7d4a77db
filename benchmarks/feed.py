"""Feeding a batch of echo lines: lines per second, memory, and the latency of its status."""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import redis

from benchmarks.site import Site, wait_until
from inferq.broker import BrokerSettings, Publisher, connect, topology_for
from inferq.producer.batch.start import start
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import free_ports
from inferq.schemas import Batch, installed_types, new_task_id
from inferq.storage import BatchIndex, BatchStore, StatusIndex, StorageSettings, upload_key

LINE = b'{"payload":"' + b"x" * 100 + b'"}\n'
_QUEUE = "inference.echo.normal"


@dataclass(frozen=True)
class Fed:
    """The cost of feeding a batch: memory in bytes, latencies of its status over HTTP in seconds.

    `late_max` is the longest delay, in seconds, of the machine in waking the requesting thread. A request needs
    several such wake-ups, independent of the gateway.
    """

    lines: int
    rate: float
    feeder_peak: int
    redis: int
    status_p50: float
    status_p99: float
    status_max: float
    late_max: float


def feed(ground: Site, lines: int) -> Fed:
    """Feed a batch of `lines` lines with a feeder process and no worker."""
    gc.freeze()  # a garbage collection of this process would count as latency of the gateway
    store = ground.store()
    name = f"{new_task_id()}.jsonl"
    source = ground.folder / name
    with source.open("wb") as file:
        for _ in range(lines // 1000):
            file.write(LINE * 1000)
    store.put(upload_key("default", name), source)
    source.unlink()
    batch = Batch(
        batch_id=new_task_id(),
        source=f"inferq:{name}",
        task_type="echo",
        max_in_flight=max(lines, 1000),
        created_at=datetime.now(UTC),
    )
    storage = StorageSettings(redis_url=ground.redis_url, store_url=ground.store_url)
    index = BatchIndex(StatusIndex.from_settings(storage))
    connection = redis.Redis.from_url(ground.redis_url)
    connection.flushdb()
    publisher = Publisher(ground.broker(), name="bench", topology=topology_for(installed_types()))
    publisher.start()
    publisher.wait_connected(20)
    argv = (
        sys.executable,
        "-P",
        "-m",
        "inferq.producer.cli",
        "callbacks",
        "--queues",
        "batches",
        "--threads",
        "2",
    )
    with _gateway(ground) as http, ground.process(*argv) as feeder:
        start(batch, BatchStore(store), lambda message: publisher.publish(message).result())
        stopping = threading.Event()
        latencies: list[float] = []
        late: list[float] = []
        watcher = threading.Thread(target=_watch, args=(http, batch.batch_id, latencies, late, stopping))
        watcher.start()

        def queued() -> int:
            standing = index.look("default", batch.batch_id)
            return standing.counts.queued if standing else 0

        wait_until(lambda: queued() > 0, 300)
        begun, before = time.monotonic(), queued()
        wait_until(lambda: queued() >= lines, 1200, pause=0.1)
        seconds = time.monotonic() - begun
        stopping.set()
        watcher.join()
        peak = _peak(feeder.pid)
        taken = sum(connection.memory_usage(key) or 0 for key in connection.scan_iter("inferq:*"))
    publisher.close()
    connection.close()
    _purge(ground.broker())
    return Fed(
        lines=lines,
        rate=(lines - before) / seconds,
        feeder_peak=peak,
        redis=taken,
        status_p50=statistics.median(latencies),
        status_p99=statistics.quantiles(latencies, n=100, method="inclusive")[-1],
        status_max=max(latencies),
        late_max=max(late),
    )


def _peak(pid: int) -> int:
    """The peak resident memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def _watch(
    http: httpx.Client, batch_id: str, latencies: list[float], late: list[float], stopping: threading.Event
) -> None:
    pause = 0.2
    while True:
        begun = time.perf_counter()
        if stopping.wait(pause):
            return
        late.append(time.perf_counter() - begun - pause)
        begun = time.perf_counter()
        answer = http.get(f"/v1/batches/{batch_id}")
        latencies.append(time.perf_counter() - begun)
        answer.raise_for_status()


@contextmanager
def _gateway(ground: Site) -> Iterator[httpx.Client]:
    (port,) = free_ports(1)
    keys = ground.folder / "keys.json"
    key = KeyFile(keys).add("default")
    argv = (sys.executable, "-P", "-m", "inferq.producer.cli", "gateway", "--port", str(port))
    with (
        ground.process(*argv, INFERQ_API_KEYS_FILE=str(keys)),
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=30
        ) as http,
    ):
        wait_until(lambda: _ready(http), 60)
        yield http


def _ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _purge(settings: BrokerSettings) -> None:
    connection = connect(settings, name="bench")
    channel = connection.channel()
    for queue in (_QUEUE, "inference.batches"):
        channel.queue_purge(queue)
    connection.close()
