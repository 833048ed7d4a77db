"""A part that does what its arguments say: `dummy.py FOLDER NAME key=value …`.

It appends `start NAME` and `stop NAME` to FOLDER/journal, and makes FOLDER/NAME.ready when it is ready.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    folder, name, *rest = sys.argv[1:]
    options = dict(word.split("=", 1) for word in rest)
    here = Path(folder)
    ready = here / f"{name}.ready"
    ready.unlink(missing_ok=True)

    def note(what: str) -> None:
        with (here / "journal").open("a") as file:
            file.write(f"{what} {name}\n")

    def end(number: int, frame: object) -> None:
        if options.get("stubborn"):
            note("ignored")
            return
        time.sleep(float(options.get("stopping", "0")))
        note("stop")
        sys.stdout.flush()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    note("start")
    starts = (here / "journal").read_text().count(f"start {name}\n")
    if options.get("fails") and starts <= int(options.get("failures", "1000")):
        sys.stdout.write(f"{name} cannot find its weights")
        sys.stdout.flush()
        sys.exit(int(options["fails"]))
    for kind in options.get("children", "").split("+"):
        if kind:
            subprocess.Popen(
                [
                    sys.executable,
                    "-S",
                    "-c",
                    "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)",
                ],
                start_new_session=kind == "session",
            )
    time.sleep(float(options.get("loading", "0")))
    if not options.get("never"):
        ready.write_text(str(os.getpid()))
    if crash := options.get("crash"):
        time.sleep(float(crash))
        sys.stdout.write(f"{name} has crashed")
        sys.stdout.flush()
        os._exit(3)
    while options.get("chatty"):
        sys.stdout.write(f"{name} has something to say\n")
        sys.stdout.flush()
        time.sleep(0.005)
    while True:
        time.sleep(60)


main()
