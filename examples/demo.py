"""Reads two pages with everything that inferq has: gateway, RabbitMQ, Redis, object store and an OCR worker.

    python examples/demo.py

Starts them (under `.inferq-demo`, apart from any other inferq), submits the pages over HTTP, shows how they
move, and stops everything. Leaves `demo-output/<page>/result.json` and `annotated.png`. Exits with 0 only
where the text is right.
"""

from __future__ import annotations

# ruff: noqa: E402 - Ctrl-C ends as quietly while the imports below load as it does later
import os
import signal
import sys


def _interrupted() -> None:
    sys.stderr.write("\nInterrupted; everything has been stopped.\n")
    sys.stderr.flush()
    os._exit(130)


signal.signal(signal.SIGINT, lambda _number, _frame: _interrupted())

import difflib
import shutil
import time
import unicodedata
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from producer.client import Client
from producer.up.detached import while_up
from producer.up.foreground import Wish
from producer.up.part import port_free
from schemas import InferqError, Result

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "examples" / "pages"
OUTPUT = ROOT / "demo-output"
DATA = ROOT / ".inferq-demo"
PORT = 8000
PATIENCE = 120.0
"""Seconds that a page may take."""


def main() -> int:
    console = Console(highlight=False)
    _forget_other_inferq()
    try:
        try:
            results = run(console)
        except InferqError as error:
            if error.code != "data_moved":
                raise
            shutil.rmtree(DATA)  # nothing in it is worth keeping
            results = run(console)
    except InferqError as error:
        console.print(f"The demo failed: {error}", style="red", markup=False)
        return 1
    reports = [report(name, result, console) for name, result in results.items()]
    right = all(reports)
    show_timings(results, console)
    console.print(f"Results and annotated pages are in {os.path.relpath(OUTPUT)}/", markup=False)
    console.print(
        "Every line was read as it stands on the page."
        if right
        else "The text is not what stands on the pages.",
        style="green" if right else "red",
    )
    return 0 if right else 1


def run(console: Console) -> dict[str, Result]:
    """Start everything, read the pages, and stop everything. Page name → result."""
    begun = time.monotonic()
    wish = Wish(DATA, PORT if port_free(PORT) else 0, ("ocr",))
    with console.status("Starting RabbitMQ, Redis, the gateway and an OCR worker") as status:
        with while_up(wish, report=lambda report: status.update(f"{report.part}: {report.stage}")) as env:
            status.stop()
            console.print(f"inferq is up at {env['INFERQ_API_URL']} after {time.monotonic() - begun:.1f} s")
            with Client(env["INFERQ_API_URL"], env["INFERQ_API_KEY"]) as client:
                results = read_pages(client, console)
            status.update("Stopping")
            status.start()
    return results


def read_pages(client: Client, console: Console) -> dict[str, Result]:
    """Submit every page, follow them to their ends, and fetch what they leave. Page name → result."""
    pages = sorted(PAGES.glob("*.png"))
    columns = (TextColumn("  {task.description:<14}"), BarColumn(24), TextColumn("{task.fields[state]:<22}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {page: progress.add_task(page.name, total=1.0, state="uploading") for page in pages}
        tasks = {}
        for page in pages:
            url = client.upload(page)
            tasks[page] = client.submit("ocr", image_url=url, options={"annotated": True}).task_id
            progress.update(bars[page], state="submitted")
        results = {}
        # One worker takes them one after the other, so they are followed one after the other.
        for page, task_id in tasks.items():
            for event in client.events(task_id):
                note = event.data.note or ""
                progress.update(
                    bars[page],
                    completed=event.data.progress or 0.0,
                    state=f"{event.data.state} {note}"[:22],
                )
            result = client.result(task_id, wait=PATIENCE)
            progress.update(bars[page], completed=1.0, state=result.status)
            results[page.stem] = result
            keep(client, page.stem, result)
    return results


def keep(client: Client, name: str, result: Result) -> None:
    """Write the page's result and its artifacts to its folder."""
    folder = OUTPUT / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for artifact in result.artifacts:
        client.download(result.task_id, artifact.name, folder / artifact.name)


def report(name: str, result: Result, console: Console) -> bool:
    """Print what was read on a page, and where it differs from what stands there; whether it does not."""
    if result.status != "succeeded" or not isinstance(result.output, dict):
        why = f": {result.error.message} ({result.error.code})" if result.error else ""
        console.print(f"{name}: {result.status}{why}", style="red", markup=False)
        return False
    read = str(result.output["text"]).splitlines()
    console.print(Panel(Text("\n".join(read)), title=name, title_align="left", expand=False))
    right = True
    if not (OUTPUT / name / "annotated.png").is_file():
        console.print(f"{name}: there is no annotated.png", style="red", markup=False)
        right = False
    expected = (PAGES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    differences = [
        line
        for line in difflib.ndiff([plain(line) for line in expected], [plain(line) for line in read])
        if line.startswith(("- ", "+ "))
    ]
    if differences:
        console.print(f"{name}: expected (-) and read (+) differ:", style="red", markup=False)
        console.print("\n".join(differences), markup=False)
        right = False
    return right


def plain(line: str) -> str:
    """A line without spaces, and with full-width letters and punctuation as their usual forms."""
    return "".join(unicodedata.normalize("NFKC", line).split())


def show_timings(results: dict[str, Result], console: Console) -> None:
    """Print where the seconds went."""
    table = Table("page", title="Seconds", title_justify="left")
    for stage in ("queued", "fetch", "inference", "upload", "total"):
        table.add_column(stage, justify="right")
    for name, result in results.items():
        timings = result.timings
        total = (result.finished_at - result.created_at).total_seconds() if result.created_at else None
        stages = (timings.queued, timings.fetch, timings.inference, timings.upload, total)
        table.add_row(name, *("" if seconds is None else f"{seconds:.3f}" for seconds in stages))
    console.print(table)


def _forget_other_inferq() -> None:
    # A shell that has sourced another inferq's `env` must not send the demo there, nor a proxy to itself.
    for name in [name for name in os.environ if name.startswith("INFERQ_")]:
        del os.environ[name]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, ["127.0.0.1", os.environ.get(name)]))


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
    except KeyboardInterrupt:
        _interrupted()
    sys.exit(code)
