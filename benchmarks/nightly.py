"""A nightly run over page images in S3, during which each part is killed or restarted once.

    python -m benchmarks.nightly --pages 2000 --rows 24 --workers 1

The pages are generated, so their text is known. Each is an object under one prefix, which a schedule names;
`inferq nightly run` starts the run. From time to time the workers are suspended, and a bare engine reads some
pages: the machine's speed varies, and this way both sides see the same variation. Prints the pages per second,
compared with as many bare engines, and the pages that were lost, misread or duplicated.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.engines import Work, bare_engine
from benchmarks.site import s3_stand_in, wait_until
from inferq.producer.up import orphan_reaper
from inferq.producer.up.part import Part, free_ports
from inferq.producer.up.process import spawn, stop
from inferq.producer.up.rabbitmq import RabbitNode, RabbitPorts
from inferq.producer.up.redis import RedisServer
from inferq.schemas import Night, Outage, Result
from inferq.storage import (
    BatchIndex,
    BatchStore,
    ResultStore,
    StatusIndex,
    StorageSettings,
    open_store,
    output_key,
)
from inferq.storage.nightly_runs import RunLog
from inferq.storage.objects.s3 import s3_client

_WORDS = ("amber", "bridge", "candle", "dragon", "ember", "forest", "garden", "harbor", "island", "jungle")
_WIDTH, _ROW_HEIGHT, _MARGIN = 420, 50, 15
_BUCKET = "pages"
_TURN, _BETWEEN = 3, 20
"""Pages that the bare engine reads per turn, and pages that the nightly run reads between two turns."""
_SCHEDULES = f"""
[scans]
cron = "30 1 * * *"
source = "s3://{_BUCKET}/night/"
task_type = "ocr"
max_in_flight = 200
"""
_FAULTS = ((20, "feeder"), (40, "worker-0"), (60, "redis"), (80, "rabbitmq"))
"""The faults: percentage of the pages after which a part ends, and the part."""


def page_text(number: int, rows: int) -> list[str]:
    """The lines of a page. All pages differ."""
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
    """All running parts. Each can be killed and started again by its name."""

    folder: Path
    env: dict[str, str]
    workers: int
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
                    self._inferq(*self.commands[name]),
                    env=os.environ | self.env,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,  # so that it can be suspended with its engine
                )

    def command(self, *arguments: str) -> str:
        """Run a command. Gives its output."""
        done = subprocess.run(
            self._inferq(*arguments), env=os.environ | self.env, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def _inferq(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "inferq.producer.cli", *arguments]

    @contextmanager
    def held(self, kind: str) -> Iterator[None]:
        """Suspend all commands of a kind, with their children, during the block."""
        sessions = {process.pid for name, process in self.running.items() if name.startswith(kind)}
        held = orphan_reaper.members(sessions, mark="")  # an engine has a process group of its own
        for process in held:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in held:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

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
def _ground(workers: int, *, take_ahead: bool) -> Iterator[Ground]:
    with tempfile.TemporaryDirectory(prefix="inferq-night-") as name, ExitStack() as stack:
        folder = Path(name)
        endpoint = stack.enter_context(s3_stand_in())
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
                "INFERQ_TAKE_AHEAD": str(take_ahead),
                "INFERQ_LOG_LEVEL": "WARNING",
            },
            workers,
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
    arguments.add_argument("--take-ahead", action="store_true", help="run workers with INFERQ_TAKE_AHEAD")
    arguments.add_argument("--no-faults", action="store_true", help="kill and restart no part")
    given = arguments.parse_args()
    ground = _ground(given.workers, take_ahead=given.take_ahead)
    right = night(given.pages, given.rows, ground, faults=not given.no_faults, say=print)
    sys.exit(0 if right else 1)


class Turns:
    """The turns of a bare engine, which reads pages while the workers are suspended."""

    def __init__(self, ground: Ground, run: Callable[[Work], None], files: Sequence[Path]) -> None:
        self._ground = ground
        self._run = run
        self._files = itertools.cycle(files)
        self._pages = 0
        self._seconds = 0.0
        self._held: list[tuple[datetime, datetime]] = []

    def take(self) -> None:
        work = [Work(files={"image_url": next(self._files)}) for _ in range(_TURN)]
        with self._ground.held("worker"):
            since = datetime.now(UTC)
            began = time.perf_counter()
            for page in work:
                self._run(page)
            self._seconds += time.perf_counter() - began
            self._pages += len(work)
            self._held.append((since, datetime.now(UTC)))

    @property
    def rate(self) -> float:
        """Pages per second."""
        return self._pages / self._seconds

    def within(self, since: datetime, until: datetime) -> float:
        """The seconds of that time during which the workers were suspended."""
        overlaps = ((min(until, end) - max(since, begin)).total_seconds() for begin, end in self._held)
        return sum(seconds for seconds in overlaps if seconds > 0)


def night(
    pages: int,
    rows: int,
    on: AbstractContextManager[Ground],
    *,
    faults: bool,
    say: Callable[[str], None],
) -> bool:
    """Do one nightly run and report on it. Gives whether no page was lost, duplicated or misread."""
    with ExitStack() as stack:
        run = stack.enter_context(bare_engine("ocr"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ground = stack.enter_context(on)
        turns = Turns(ground, run, [_page_file(folder, number, rows) for number in range(min(pages, 60))])
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

        events = [(at, turns.take) for at in range(min(_BETWEEN, pages) // 2, pages, _BETWEEN)]
        if faults:
            events += [(pages * at // 100, partial(_end, ground, name, say)) for at, name in _FAULTS]
        for at, event in sorted(events, key=itemgetter(0)):
            wait_until(lambda at=at: done() >= at, 3600, pause=0.5)
            event()
        wait_until(lambda: batches.summary("default", run_id) is not None, 3600, pause=0.5)
        output = [json.loads(line) for line in store.get(output_key("default", run_id)).splitlines()]
        log = RunLog(store, "default", "scans")
        wait_until(lambda: bool(log.nights(run_id, Night)), 60, pause=0.5)
        (summary,) = log.nights(run_id, Night)
        kept = [r for e in output if (r := ResultStore(store).load("default", e["task_id"])) is not None]
    say(
        f"the night's own summary: {summary.succeeded} of {summary.total}, {summary.pages_per_second} pages/s"
    )
    return _report(output, pages, rows, kept, turns, ground.workers, say)


def _end(ground: Ground, name: str, say: Callable[[str], None]) -> None:
    """Kill a part, or stop it if it is the broker; then start it again."""
    if name == "rabbitmq":
        ground.stop(name)
    else:
        ground.kill(name)
    ground.start(name)
    say(f"{name} {'restarted' if name == 'rabbitmq' else 'killed'}")


def _page_file(folder: Path, number: int, rows: int) -> Path:
    path = folder / f"{number}.png"
    path.write_bytes(page_image(number, rows))
    return path


def _report(
    output: list[dict[str, Any]],
    pages: int,
    rows: int,
    kept: list[Result],
    turns: Turns,
    workers: int,
    say: Callable[[str], None],
) -> bool:
    lines = [entry["line"] for entry in output]
    wrong = [
        entry["line"]
        for entry in output
        if plain(entry["output"]["text"]) != plain("".join(page_text(entry["line"] - 1, rows)))
    ]
    spans = [(r.started_at, r.finished_at, r.timings.inference or 0.0) for r in kept if r.started_at]
    began, ended = min(since for since, _, _ in spans), max(until for _, until, _ in spans)
    seconds = (ended - began).total_seconds() - turns.within(began, ended)
    computed = spent = 0.0
    for since, until, inference in spans:
        held = turns.within(since, until)
        spent += (until - since).total_seconds() - held
        # Nearly all of a page's time is inference, so nearly all suspensions fall into it.
        computed += inference - held if inference > held else inference
    whole, bare = pages / seconds, turns.rate * workers
    say(
        f"of a page's {1000 * workers * seconds / pages:.0f} ms: {1000 * computed / pages:.0f} inference, "
        f"{1000 * (spent - computed) / pages:.0f} input and result, "
        f"{1000 * (workers * seconds - spent) / pages:.0f} between two pages"
    )
    once = len(set(lines))
    say(f"pages {pages}, in the output {len(output)}: lost {pages - once}, duplicated {len(lines) - once}")
    say(f"in line order: {lines == sorted(lines)}; misread: {len(wrong)} {wrong[:10]}")
    say(f"pages/s: {whole:.2f} whole, {bare:.2f} with as many bare engines, ratio {whole / bare:.3f}")
    return sorted(lines) == list(range(1, pages + 1)) and not wrong


if __name__ == "__main__":
    main()
