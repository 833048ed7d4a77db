"""A stand-in for FaceFusion 3.8's command line: the same arguments, exit statuses and words.

What it does is read from `behaviour` beside it; what it was asked goes to `calls.jsonl`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from facefusion import HOME, behaviour, create_program, note, process, say


def main() -> int:
    if behaviour() == "broken":
        say("FFMpeg is not installed")
        return 2
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    given = create_program().parse_args()
    note(argv=sys.argv[1:], cwd=str(Path.cwd()), env=dict(os.environ))
    if Path.cwd() != HOME or Path(given.target_path).suffix != Path(given.output_path).suffix:
        say("Match the target and output extension!")
        return 1
    jobs = Path(given.jobs_path)
    if jobs.exists():  # somebody else's
        return 1
    for folder in (jobs / "queued", Path(given.temp_path) / "facefusion"):
        folder.mkdir(parents=True)
    say("Processing step 1 of 1")
    return 0 if process(behaviour(), given.target_path, given.output_path) == 0 else 1


sys.exit(main())
