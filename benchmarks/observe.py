"""What it costs to observe: logs as JSON, metrics that are read, traces."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from benchmarks.contestants import PAYLOAD, Inferq
from benchmarks.site import Site, wait_until
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import free_ports

SCRAPE_SECONDS = 5.0
_CLIENTS = 4

QUIET: Mapping[str, str] = {"INFERQ_LOG_LEVEL": "ERROR"}
JSON_LOGS: Mapping[str, str] = {"INFERQ_LOG_LEVEL": "INFO", "INFERQ_LOG_FORMAT": "json"}


class _Collector(BaseHTTPRequestHandler):
    """Takes all spans and keeps none."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def collector() -> Iterator[Mapping[str, str]]:
    """The settings that export one trace of a hundred to a collector, which runs during the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.01",
        }
        server.shutdown()


@contextmanager
def scraped(url: str) -> Iterator[None]:
    """Read the metrics at `url` every SCRAPE_SECONDS during the block."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(SCRAPE_SECONDS):
            httpx.get(url, timeout=60).raise_for_status()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Observed(Inferq):
    """inferq without fsync, whose worker has these settings; `read`: whether its metrics are read meanwhile."""

    def __init__(self, site: Site, name: str, settings: Mapping[str, str], *, read: bool = False) -> None:
        super().__init__(site, fsync=False)
        self.name = name
        self._read = read
        self._settings |= settings

    @contextmanager
    def worker(self) -> Iterator[object]:
        (port,) = free_ports(1)
        self._settings["INFERQ_PROBE_PORT"] = str(port)
        with super().worker() as process:
            if not self._read:
                yield process
                return
            url = f"http://127.0.0.1:{port}/metrics"
            with scraped(url):
                yield process


def submissions_per_second(ground: Site, settings: Mapping[str, str], count: int, *, read: bool) -> float:
    """Tasks that a gateway with these settings accepts per second, from four clients that each wait for the answer."""
    (port,) = free_ports(1)
    keys = ground.folder / "keys.json"
    key = KeyFile(keys).add("default", name="bench")
    address = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-P", "-m", "inferq.producer.cli", "gateway", "--port", str(port))
    with ground.process(*command, **{"INFERQ_API_KEYS_FILE": str(keys), **settings}):
        wait_until(lambda: _ready(address))

        def submit(number: int) -> None:
            with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}) as client:
                for _ in range(number):
                    body = {"task_type": "clock", "payload": PAYLOAD}
                    client.post("/v1/tasks", json=body, timeout=60).raise_for_status()

        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(submit, [25] * _CLIENTS))  # warm-up
            began = time.perf_counter()
            if read:
                with scraped(f"{address}/metrics"):
                    list(clients.map(submit, [count // _CLIENTS] * _CLIENTS))
            else:
                list(clients.map(submit, [count // _CLIENTS] * _CLIENTS))
            return count / (time.perf_counter() - began)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.TransportError:
        return False
