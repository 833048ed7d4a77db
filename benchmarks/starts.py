"""What a start costs: the first result from zero, and the first task of a ready worker compared with later ones."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import PAGES, SENTENCES, Work, stored_inputs, task_of
from benchmarks.site import Site, wait_until
from inferq.broker import Publisher, task_message, topology_for
from inferq.producer.up.part import free_ports
from inferq.schemas import new_task_id

_PORTRAITS = Path(__file__).parent.parent / "examples" / "portraits"

WORK = {
    "echo": Work({"payload": {"n": 1}}),
    "ner": Work({"text": SENTENCES[0]}),
    "ocr": Work(files={"image_url": PAGES[0]}),
    "facefusion": Work(
        files={
            "source_url": _PORTRAITS / "portrait_collins.png",
            "target_url": _PORTRAITS / "portrait_hopper.jpg",
        }
    ),
    "acestep": Work({"prompt": "calm piano", "duration": 10}),
}


@dataclass(frozen=True)
class Start:
    """Seconds from delivery to result: of the first task, and the median of later ones."""

    first: float
    later: float


@dataclass(frozen=True)
class FromZero:
    """Seconds from the start of a process to its first answer: of the bare engine, and of a worker."""

    bare: float
    worker: float


def from_zero(site: Site, type_name: str, *, rounds: int, **settings: str) -> Sequence[FromZero]:
    """Start the bare engine and a worker in turn, `rounds` times. The worker's task waits in its queue already."""
    work, results, found = WORK[type_name], site.results(), []
    stored_inputs(site, [work])
    publisher = Publisher(site.broker(), name="bench", topology=topology_for([type_name]))
    publisher.start()
    files = [f"{name}={path}" for name, path in work.files.items()]
    for _ in range(rounds):
        task_id = new_task_id()
        task = task_of(type_name, task_id, work)
        command = [sys.executable, "-P", "-m", "benchmarks.bare", task.model_dump_json(exclude_unset=True)]
        began = time.monotonic()
        subprocess.run([*command, *files], env=site.environment(), check=True, capture_output=True)
        bare = time.monotonic() - began
        publisher.publish(task_message(task)).result(20)
        began = time.monotonic()
        with site.inferq_worker(type_name, **settings):
            while (result := results.load("default", task_id)) is None:
                time.sleep(0.01)
            found.append(FromZero(bare, time.monotonic() - began))
        if result.status != "succeeded":
            raise RuntimeError(f"{task_id}: {result.error}")
    publisher.close()
    return found


def starts(site: Site, type_name: str, *, rounds: int, later: int) -> Sequence[Start]:
    """Start a worker `rounds` times. Once it is ready, send it one task at a time, `later` after the first."""
    work, results, found = WORK[type_name], site.results(), []
    stored_inputs(site, [work])
    publisher = Publisher(site.broker(), name="bench", topology=topology_for([type_name]))
    publisher.start()

    def seconds() -> float:
        task_id = new_task_id()
        publisher.publish(task_message(task_of(type_name, task_id, work))).result(20)
        while (result := results.load("default", task_id)) is None:
            time.sleep(0.005)
        if result.status != "succeeded" or result.started_at is None:
            raise RuntimeError(f"{task_id}: {result.error}")
        return (result.finished_at - result.started_at).total_seconds()

    for _ in range(rounds):
        port = free_ports(1)[0]
        with site.inferq_worker(type_name, INFERQ_LANES="normal", INFERQ_PROBE_PORT=str(port)):
            wait_until(lambda port=port: _ready(port))
            first, *others = [seconds() for _ in range(1 + later)]
            found.append(Start(first, statistics.median(others)))
    publisher.close()
    return found


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
