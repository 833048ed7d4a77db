"""A worker that is far from its broker and its object store: proxies hold every byte back for a while."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.site import Site, s3_stand_in
from inferq.broker import Publisher, task_message, topology_for
from inferq.schemas import PRIORITIES, new_task_id, parse_task
from inferq.storage import ResultStore, StatusIndex, StorageSettings, open_store
from inferq.storage.objects.s3 import s3_client

ROUND_TRIP_SECONDS = 0.05


@dataclass(frozen=True)
class Drained:
    """How one worker drained its queues: tasks per second, and the share of the time in which its engine computed."""

    rate: float
    busy: float


@contextmanager
def far_away(site: Site) -> Iterator[Mapping[str, str]]:
    """The settings of a worker that is a round trip of ROUND_TRIP_SECONDS away from RabbitMQ and from an S3."""
    with s3_stand_in() as s3:
        s3_client(s3).create_bucket(Bucket="results")
        broker_port, s3_port = urlsplit(site.amqp_url).port, urlsplit(s3).port
        with delayed(broker_port or 5672) as far_broker, delayed(s3_port or 80) as far_s3:
            yield {
                "INFERQ_AMQP_URL": site.amqp_url.replace(f":{broker_port}", f":{far_broker}"),
                "INFERQ_STORE_URL": "s3://results",
                "INFERQ_S3_ENDPOINT_URL": f"http://127.0.0.1:{far_s3}",
                "NEAR_S3": s3,
            }


def drain(site: Site, settings: Mapping[str, str], type_name: str, count: int, **fields: object) -> Drained:
    """Publish tasks on all lanes by turns, and have one worker drain them."""
    storage = StorageSettings(
        store_url=settings["INFERQ_STORE_URL"], s3_endpoint_url=settings["NEAR_S3"], redis_url=site.redis_url
    )
    results = ResultStore(open_store(storage))
    index = StatusIndex.from_settings(storage)
    publisher = Publisher(site.broker(), name="bench", topology=topology_for([type_name]))
    publisher.start()
    publisher.wait_connected(20)
    ids = [new_task_id() for _ in range(count)]
    for number, task_id in enumerate(ids):
        lane = PRIORITIES[number * len(PRIORITIES) // count]
        task = parse_task({"task_id": task_id, "task_type": type_name, "priority": lane, **fields})
        index.submit(task)  # as the gateway does
        publisher.publish(task_message(task)).result(20)
    publisher.close()
    index.close()
    with site.inferq_worker(type_name, **settings):
        ended = []
        for task_id in ids:
            while (result := results.load("default", task_id)) is None:
                time.sleep(0.05)
            ended.append(result)
    # The first ones are the warm-up.
    ended = sorted(ended, key=lambda result: result.finished_at)[count // 10 :]
    first, last = ended[0].finished_at, ended[-1].finished_at
    seconds = (last - first).total_seconds()
    computed = sum(result.timings.inference for result in ended[1:])
    return Drained((len(ended) - 1) / seconds, computed / seconds)


@contextmanager
def delayed(port: int) -> Iterator[int]:
    """The port of a proxy that passes every byte on after half of ROUND_TRIP_SECONDS, in both directions."""
    loop = asyncio.new_event_loop()
    started: list[int] = []
    ready = threading.Event()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def pass_on() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    sink.close()
                    return
                sink.write(data)

        passing = loop.create_task(pass_on())
        data = b"-"
        while data:
            try:
                data = await source.read(1 << 16)
            except OSError:
                data = b""
            waiting.put_nowait((loop.time() + ROUND_TRIP_SECONDS / 2, data))
        with suppress(OSError):
            await passing

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async def serve() -> None:
        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        started.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
