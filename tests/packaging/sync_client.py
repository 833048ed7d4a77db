"""Generates the synchronous client from the asynchronous one: `python -m tests.packaging.sync_client`.

`make generate` runs it. With `--check`, as in `make lint`, it only fails if the generated file is stale.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

from tests.packaging.wheel import ROOT

SOURCE = ROOT / "producer/client/async_client.py"
TARGET = ROOT / "producer/client/sync_client.py"

# In code, docstrings and comments alike.
_TOKENS = [
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"\bAwaitable\[([\w.]+)\]", r"\1"),
    (r"\bAsync(?=[A-Z])", ""),  # AsyncClient, httpx.AsyncBaseTransport, AsyncIterator
    (r"\basync_(?=io|client)", "sync_"),
    (r"\ba(?=(read|close|iter_raw|iter_bytes)\()", ""),
    (r"\b__a(?=(enter|exit)__)", "__"),
]
# What the tokens leave of a sentence, and how it reads for the synchronous client.
_TEXTS = [
    (
        '"""`Client`, the Python client of the gateway for asynchronous code.\n\n'
        'sync_client.py is generated from this file: run `make generate` after a change.\n"""',
        '"""`Client`, the Python client of the gateway for code without an event loop."""',
    ),
    (
        "for asyncio and trio. `Client` has the same methods for code without an event loop.",
        "for code without an event loop. `AsyncClient` has the same methods for asyncio and trio.",
    ),
    ("also at the same time: it keeps", "also from several threads: it keeps"),
]


def generate(source: str) -> str:
    """The text of the synchronous client. Raises ValueError if a sentence to be replaced is not in `source`."""
    text = source
    for pattern, replacement in _TOKENS:
        text = re.sub(pattern, replacement, text)
    for old, new in _TEXTS:
        if text.count(old) != 1:
            raise ValueError(f"{SOURCE.name} does not contain this once; change it in {__file__} too: {old}")
        text = text.replace(old, new)
    text = f"# Generated from {SOURCE.name} by `make generate`. Change that file, not this one.\n{text}"
    # Removes imports that are unused now, sorts the others, and turns loops that only yield into `yield from`.
    return _ruff("format", _ruff("check", text, "--fix-only", "--unsafe-fixes", "--select", "F401,I,UP028"))


def _ruff(command: str, text: str, *options: str) -> str:
    argv = ["ruff", command, *options, "--quiet", "--stdin-filename", str(TARGET), "-"]
    return subprocess.run(
        [sys.executable, "-P", "-m", *argv], input=text, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the synchronous client from the asynchronous one.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is stale")
    check = parser.parse_args().check
    text = generate(SOURCE.read_text())
    current = TARGET.read_text() if TARGET.exists() else ""
    if check and text != current:
        print(f"{TARGET.relative_to(ROOT)} is not what {SOURCE.name} generates; run: make generate")
        return 1
    if text != current:
        TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
