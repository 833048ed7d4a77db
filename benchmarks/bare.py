"""The bare engine in a new interpreter: loads, and computes one task, without queue, worker, store or warm-up.

`python -P -m benchmarks.bare TASK [FIELD=FILE]...`, where TASK is the task's JSON. Its inputs are files, or data URLs.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
import tempfile
from pathlib import Path

from inferq.consumers.runtime.child import engine_class
from inferq.engine import Context, InputFile
from inferq.schemas import get_type, parse_task


def main() -> None:
    given = json.loads(sys.argv[1])
    engine = engine_class(get_type(given["task_type"]))()
    engine.load()
    inputs = {}
    for argument in sys.argv[2:]:
        field, _, name = argument.partition("=")
        kind = mimetypes.guess_type(name)[0] or ""
        inputs[field] = InputFile(Path(name), Path(name).stat().st_size, kind)
    with tempfile.TemporaryDirectory() as name:
        for field, url in given.items():
            if str(url).startswith("data:"):
                path = Path(name) / field
                path.write_bytes(base64.b64decode(url.partition(",")[2]))
                inputs[field] = InputFile(path, path.stat().st_size, "image/png")
        context = Context(
            folder=Path(name) / "scratch",
            inputs=inputs,
            report=lambda _fraction, _note: None,
            abort_requested=lambda: False,
        )
        engine.run(parse_task(given), context)
    engine.close()


if __name__ == "__main__":
    main()
