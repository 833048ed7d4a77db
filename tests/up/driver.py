"""A supervisor over dummy parts, in a process of its own: `driver.py FOLDER MARK PARTS`, PARTS as JSON.

It prints one JSON line for each report, `{"ready": true, …}`, and `{"failed": MESSAGE}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from inferq.producer.up import process, supervisor
from inferq.producer.up.folder import DataFolder
from inferq.producer.up.part import Part
from inferq.producer.up.supervisor import Backoff, PartFailed, Supervisor

process.LOG_BYTES = 2000
supervisor.LOG_LOOK_SECONDS = 0.1

DUMMY = Path(__file__).with_name("dummy.py")


def part(folder: Path, order: dict) -> Part:
    name = order["name"]
    options = [f"{key}={value}" for key, value in order.get("options", {}).items()]
    argv = order.get("argv", [sys.executable, "-S", str(DUMMY), str(folder), name, *options])

    def probe() -> str | None:
        try:
            pid = int((folder / f"{name}.ready").read_text())
            os.kill(pid, 0)  # the file may be that of an earlier life
        except (OSError, ValueError):
            return "not there yet"
        return None

    return Part(
        name=name,
        argv=tuple(argv),
        env=dict(os.environ),
        probe=probe,
        needs=tuple(order.get("needs", ())),
        stop_rank=order.get("rank", 0),
        grace=order.get("grace", 5),
        start_limit=order.get("limit", 20),
        gentle=order.get("gentle", False),
        optional=order.get("optional", False),
    )


def say(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main() -> int:
    folder, mark, orders = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    held = DataFolder(folder / "data").hold()
    driven = Supervisor(
        [part(folder, order) for order in orders],
        folder / "logs",
        mark=mark,
        report=lambda report: say(**asdict(report)),
        held=held,
        backoff=Backoff(first=0.05, most=0.2, steady=orders[0].get("steady", 60), patience=3),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, driven.request_stop)
    say(armed=True)
    try:
        await driven.run(lambda: say(ready=True, left_out=driven.left_out, late=driven.late))
    except PartFailed as error:
        say(failed=str(error))
        return 1
    return 0


sys.exit(asyncio.run(main()))
