"""From zero to the first result and back to zero, in the usual times of KEDA, beside the bare engine."""

from __future__ import annotations

import base64
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from inferq.broker import BrokerSettings, Publisher, task_message, topology_for
from inferq.schemas import parse_task
from tests.conftest import RabbitMQ
from tests.scale_in.cluster import Cluster, programs, result_of
from tests.scale_in.kubernetes_api import ApiServer
from tests.scale_in.rules import Scaler, Timing

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"
TIMING = Timing(cooldown=10.0)
"""KEDA's and the HPA's times, but for the cooldown, which only lasts."""
_LOAD_SECONDS = 20
"""How long the engine of the tests' own type loads: as long as one whose weights fill a GPU."""
_ROUNDS = 3
_LIMIT_SECONDS = 180.0


def measure(task_type: str, rabbitmq: RabbitMQ, redis_url: str, folder: Path) -> str:
    """The steps of some rounds, and the bare engine's seconds between them, as a table in Markdown."""
    sys.path.insert(0, str(PLUGIN))
    bare, steps = [], []
    for number in range(_ROUNDS):
        bare.append(_bare(task_type))
        steps.append(_round(task_type, rabbitmq, redis_url, folder / f"round-{number}"))
    names = list(steps[0])
    rows = [f"| {name} | {statistics.median(each[name] for each in steps):.2f} |" for name in names]
    pod = statistics.median(each["pod's start to the first result"] for each in steps)
    alone = statistics.median(bare)
    return "\n".join(
        [
            f"| {task_type}, median of {_ROUNDS} rounds | seconds |",
            "| --- | --- |",
            *rows,
            f"| the bare engine: a new interpreter to its answer | {alone:.2f} |",
            f"| pod's start to the first result, as a multiple of that | {pod / alone:.3f} |",
        ]
    )


def task_of(task_type: str) -> dict[str, Any]:
    body: dict[str, Any] = {"task_id": "first", "task_type": task_type}
    if task_type == "ocr":
        from PIL import Image, ImageDraw

        picture, file = Image.new("RGB", (480, 120), "white"), io.BytesIO()
        ImageDraw.Draw(picture).text((20, 40), "from zero to the first result", fill="black")
        picture.save(file, "PNG")
        body["image_url"] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    if task_type == "ner":
        body["text"] = "from zero to the first result"
    return body


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PLUGIN), str(ROOT)]),
        "FAULTY_LOAD_SECONDS": str(_LOAD_SECONDS),
    }


def _bare(task_type: str) -> float:
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "benchmarks.bare", json.dumps(task_of(task_type))]
    subprocess.run(command, env=_environment(), check=True, capture_output=True)
    return time.monotonic() - began


def _round(task_type: str, rabbitmq: RabbitMQ, redis_url: str, folder: Path) -> dict[str, float]:
    """The seconds of each step."""
    folder.mkdir()
    with rabbitmq.vhost("first-result") as amqp_url, ApiServer() as api:
        env = _environment() | {
            "INFERQ_AMQP_URL": amqp_url,
            "INFERQ_REDIS_URL": redis_url,
            "INFERQ_STORE_URL": (folder / "store").as_uri(),
            "INFERQ_SCRATCH_DIR": str(folder),
        }
        scaler, vhost = Scaler(TIMING, 1), amqp_url.rpartition("/")[2]
        cluster = Cluster(programs(folder), api, scaler, rabbitmq.management, vhost, env, task_type)
        publisher = Publisher(
            BrokerSettings(amqp_url=amqp_url), name="first", topology=topology_for([task_type])
        )
        publisher.start()
        try:
            publisher.publish(task_message(parse_task(task_of(task_type)))).result(30)
            submitted = time.monotonic()
            answered = None
            while not cluster.started or cluster.pods:
                cluster.step()
                if answered is None and result_of(folder / "store", "first") is not None:
                    answered = time.monotonic()
                if time.monotonic() - submitted > _LIMIT_SECONDS:
                    raise TimeoutError(f"not back to zero: {cluster.events}")
                time.sleep(0.01)
        finally:
            publisher.close()
            cluster.close()
    at = {text.split(" ", 1)[1]: when for when, text in cluster.events}
    assert answered is not None
    return {
        "submitted to the pod's start (KEDA)": at["started"] - submitted,
        "pod's start to ready": at["ready"] - at["started"],
        "pod's start to the first result": answered - at["started"],
        "submitted to the first result": answered - submitted,
        f"the first result to the pod's removal (KEDA, cooldown {TIMING.cooldown:.0f} s)": at["removed"]
        - answered,
        "the pod's removal to its end": at["gone"] - at["removed"],
    }
