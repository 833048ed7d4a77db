"""A night's run over page images in S3, with everything that can die dying once on the way.

    python -m benchmarks.nightly --pages 2000 --rows 9 --workers 1

The pages are made, so that their text is known; each is an object under one prefix, which a schedule names
and `inferq nightly run` starts. Prints pages per second beside as many bare engines, measured before and
after the night, and what was lost, read wrongly or put out twice.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.site import wait_until
from producer.nightly.night import Night
from producer.nightly.runs import RunLog
from producer.up.part import Part, free_ports
from producer.up.process import spawn, stop
from producer.up.rabbitmq import RabbitNode, RabbitPorts
from producer.up.redis import RedisServer
from schemas import Outage, Result
from storage import BatchIndex, BatchStore, ResultStore, StatusIndex, StorageSettings, open_store, output_key
from storage.s3 import s3_client

_WORDS = ("amber", "bridge", "candle", "dragon", "ember", "forest", "garden", "harbor", "island", "jungle")
_WIDTH, _ROW_HEIGHT, _MARGIN = 420, 50, 15
_BUCKET = "pages"
_SCHEDULES = f"""
[scans]
cron = "30 1 * * *"
source = "s3://{_BUCKET}/night/"
task_type = "ocr"
max_in_flight = 200
"""
_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def page_text(number: int, rows: int) -> list[str]:
    """The lines of a page; no two pages have the same."""
    digits = f"{number:04d}"
    lines = [f"Page {digits}"]
    for row in range(1, rows):
        first, second = (int(digits[(2 * row + place) % 4]) for place in (0, 1))
        lines.append(f"{_WORDS[(first + row) % 10]} {_WORDS[(second + 3 * row) % 10]}")
    return lines


def page_image(number: int, rows: int) -> bytes:
    """The page as a PNG."""
    image = Image.new("RGB", (_WIDTH, 2 * _MARGIN + _ROW_HEIGHT * rows), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=30)
    for row, text in enumerate(page_text(number, rows)):
        draw.text((20, _MARGIN + _ROW_HEIGHT * row), text, fill="black", font=font)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def plain(text: str) -> str:
    return "".join(text.lower().split())


@dataclass
class Ground:
    """Everything that runs, each to be killed and started again by its name."""

    folder: Path
    env: dict[str, str]
    parts: dict[str, Part] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        log = self.folder / f"{name}.log"
        if (part := self.parts.get(name)) is not None:
            self.running[name] = spawn(part, log)
            wait_until(lambda: part.probe() is None, part.start_limit)
        else:
            with log.open("ab") as out:
                self.running[name] = subprocess.Popen(
                    self._inferq(*self.commands[name]), env=os.environ | self.env, stdout=out, stderr=out
                )

    def command(self, *arguments: str) -> str:
        """What one command says."""
        done = subprocess.run(
            self._inferq(*arguments), env=os.environ | self.env, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def _inferq(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "producer.cli", *arguments]

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    def stop(self, name: str) -> None:
        process = self.running.pop(name)
        if (part := self.parts.get(name)) is not None:
            stop(process, part)
            return
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(45)
        process.kill()
        process.wait()


@contextmanager
def _ground(workers: int) -> Iterator[Ground]:
    with tempfile.TemporaryDirectory(prefix="inferq-night-") as name, ExitStack() as stack:
        folder = Path(name)
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        moto = subprocess.Popen(
            [sys.executable, "-c", _MOTO],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(moto.wait)
        stack.callback(moto.kill)
        endpoint = f"http://127.0.0.1:{int(moto.stdout.readline())}"  # type: ignore[union-attr]
        schedules = folder / "schedules.toml"
        schedules.write_text(_SCHEDULES)
        node = RabbitNode.prepare(folder / "rabbitmq", RabbitPorts(*free_ports(5)))
        server = RedisServer.prepare(folder / "redis", free_ports(1)[0])
        ground = Ground(
            folder,
            {
                "INFERQ_AMQP_URL": node.url,
                "INFERQ_REDIS_URL": server.url,
                "INFERQ_STORE_URL": "s3://results",
                "INFERQ_S3_ENDPOINT_URL": endpoint,
                "INFERQ_FETCH_S3_BUCKETS": _BUCKET,
                "INFERQ_SCHEDULES_FILE": str(schedules),
                "INFERQ_LOG_LEVEL": "WARNING",
            },
        )
        ground.parts = {part.name: part for part in (*node.parts(), server.part())}
        ground.commands = {"feeder": ["callbacks", "--queues", "batches", "--threads", "4"]}
        ground.commands |= {f"worker-{n}": ["worker", "ocr"] for n in range(workers)}
        client = s3_client(endpoint)
        for bucket in ("results", _BUCKET):
            client.create_bucket(Bucket=bucket)
        try:
            for part in [*ground.parts, *ground.commands]:
                ground.start(part)
            yield ground
        finally:
            for part in reversed(list(ground.running)):
                ground.stop(part)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.nightly", description=__doc__)
    arguments.add_argument("--pages", type=int, default=2000)
    arguments.add_argument("--rows", type=int, default=3, help="lines of text on a page")
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--no-faults", action="store_true", help="kill nothing")
    given = arguments.parse_args()
    right = night(given.pages, given.rows, given.workers, faults=not given.no_faults, say=print)
    sys.exit(0 if right else 1)


def night(pages: int, rows: int, workers: int, *, faults: bool, say: Callable[[str], None]) -> bool:
    """Run one night and say what came of it; whether nothing was lost, and nothing had twice."""
    before = _bare_rate(min(pages, 60), rows)
    with _ground(workers) as ground:
        storage = StorageSettings(
            redis_url=ground.env["INFERQ_REDIS_URL"],
            store_url=ground.env["INFERQ_STORE_URL"],
            s3_endpoint_url=ground.env["INFERQ_S3_ENDPOINT_URL"],
        )
        client = s3_client(storage.s3_endpoint_url)

        def upload(number: int) -> None:
            client.put_object(Bucket=_BUCKET, Key=f"night/{number:06d}.png", Body=page_image(number, rows))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(upload, range(pages)))
        store = open_store(storage)
        batches, index = BatchStore(store), BatchIndex(StatusIndex.from_settings(storage))
        run_id = json.loads(ground.command("nightly", "run", "scans", "--json"))["run_id"]

        def done() -> int:
            try:
                standing = index.look("default", run_id)
            except Outage:
                return 0
            return standing.counts.ended if standing is not None and standing.known else 0

        for share, name in ((0.2, "feeder"), (0.4, "worker-0"), (0.6, "redis"), (0.8, "rabbitmq")):
            wait_until(lambda share=share: done() >= share * pages, 3600, pause=0.5)
            if faults:
                if name == "rabbitmq":
                    ground.stop(name)
                else:
                    ground.kill(name)
                ground.start(name)
                say(f"{name} {'restarted' if name == 'rabbitmq' else 'killed'} at {share:.0%}")
        wait_until(lambda: batches.summary("default", run_id) is not None, 3600, pause=0.5)
        output = [json.loads(line) for line in store.get(output_key("default", run_id)).splitlines()]
        log = RunLog(store, "default", "scans")
        wait_until(lambda: bool(log.nights(run_id, Night)), 60, pause=0.5)
        (told,) = log.nights(run_id, Night)
        kept = [r for e in output if (r := ResultStore(store).load("default", e["task_id"])) is not None]
    # Machines change their speed meanwhile, so that one look would be a matter of luck.
    after = _bare_rate(min(pages, 60), rows)
    say(f"a bare engine: {before:.2f} pages/s before the night, {after:.2f} after it")
    say(f"the night's own summary: {told.succeeded} of {told.total}, {told.pages_per_second} pages/s")
    return _reckoned(output, pages, rows, kept, (before + after) / 2 * workers, say)


def _reckoned(
    output: list[dict[str, Any]],
    pages: int,
    rows: int,
    kept: list[Result],
    bare: float,
    say: Callable[[str], None],
) -> bool:
    lines = [entry["line"] for entry in output]
    wrong = [
        entry["line"]
        for entry in output
        if plain(entry["output"]["text"]) != plain("".join(page_text(entry["line"] - 1, rows)))
    ]
    began = min(r.started_at for r in kept if r.started_at)
    seconds = (max(r.finished_at for r in kept) - began).total_seconds()
    whole = pages / seconds
    computed = sum(r.timings.inference or 0.0 for r in kept)
    spent = sum((r.finished_at - r.started_at).total_seconds() for r in kept if r.started_at)
    say(
        f"of a page's {1000 * seconds / pages:.0f} ms: {1000 * computed / pages:.0f} inference, "
        f"{1000 * (spent - computed) / pages:.0f} input and result, "
        f"{1000 * (seconds - spent) / pages:.0f} between two pages"
    )
    once = len(set(lines))
    say(f"pages {pages}, in the output {len(output)}: lost {pages - once}, twice {len(lines) - once}")
    say(f"in line order: {lines == sorted(lines)}; not read as drawn: {len(wrong)} {wrong[:10]}")
    say(f"pages/s: {whole:.2f} whole, {bare:.2f} as many bare engines, ratio {whole / bare:.3f}")
    return sorted(lines) == list(range(1, pages + 1)) and not wrong


def _bare_rate(pages: int, rows: int) -> float:
    from benchmarks.engines import Work, _bare_engine

    with tempfile.TemporaryDirectory() as name, _bare_engine("ocr") as run:
        files = []
        for number in range(pages):
            path = Path(name) / f"{number}.png"
            path.write_bytes(page_image(number, rows))
            files.append(path)
        run(Work(files={"image_url": files[0]}))
        began = time.perf_counter()
        for path in files:
            run(Work(files={"image_url": path}))
        return pages / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
