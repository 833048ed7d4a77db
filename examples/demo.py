"""Runs one task of each type through all of inferq: gateway, RabbitMQ, Redis, object store and workers.

    python examples/demo.py

It starts everything under `.inferq-demo`, apart from any other inferq. Over HTTP it submits two pages to read,
a text to search for names, two portraits to swap, a piece of music to make, and a small batch. It shows their
progress, receives a callback, verifies its signature, and stops everything. It writes
`demo-output/<name>/result.json` and the artifacts of each task. The exit status is 0 only if all is right.
"""

from __future__ import annotations

# ruff: noqa: E402 - Ctrl-C ends the demo quietly even while the imports below load
import os
import signal
import sys


def _interrupted() -> None:
    sys.stderr.write("\nInterrupted; everything has been stopped.\n")
    sys.stderr.flush()
    os._exit(130)


signal.signal(signal.SIGINT, lambda _number, _frame: _interrupted())

import difflib
import json
import shutil
import threading
import time
import unicodedata
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from inferq import Client
from inferq.producer.cli.listener import Heard, Listener
from inferq.producer.up.detached import while_up
from inferq.producer.up.foreground import UpOptions
from inferq.producer.up.part import port_free
from inferq.producer.up.plan import TENANT
from inferq.producer.up.supervisor import Report
from inferq.schemas import InferqError, Result
from inferq.storage import WebhookSecrets

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "examples" / "pages"
PORTRAITS = ROOT / "examples" / "portraits"
OUTPUT = ROOT / "demo-output"
DATA = ROOT / ".inferq-demo"
PORT = 8000
PATIENCE = 120.0
"""Seconds that a task may take."""
CALLBACK_PATIENCE = 20.0
"""Seconds to wait for the callback after the tasks have ended."""

TEXT = "昨天下午，李明和王芳从北京来到上海，参观了上海交通大学。"
NAMES = {
    ("昨天下午", "TIME"), ("李明", "PER"), ("王芳", "PER"),
    ("北京", "LOC"), ("上海", "LOC"), ("上海交通大学", "ORG"),
}  # fmt: skip
PROMPT = "calm piano with soft strings, slow, hopeful"
MUSIC_SECONDS = 10
BATCH_LINES = 20
BATCH_FOLDER = OUTPUT / "batch"


@dataclass(frozen=True)
class Exhibit:
    """A task to show. `files` are the files to upload, by field; `check` prints the result and tests it."""

    name: str
    task_type: str
    check: Callable[[Exhibit, Result, Console], bool]
    files: Mapping[str, Path] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return OUTPUT / self.name


def exhibits() -> list[Exhibit]:
    pages = [
        Exhibit(page.stem, "ocr", check_page, {"image_url": page}, {"options": {"annotated": True}})
        for page in sorted(PAGES.glob("*.png"))
    ]
    return [
        *pages,
        Exhibit("names", "ner", check_names, fields={"text": TEXT}),
        Exhibit(
            "portrait",
            "facefusion",
            check_portrait,
            {
                "source_url": PORTRAITS / "portrait_collins.png",
                "target_url": PORTRAITS / "portrait_hopper.jpg",
            },
        ),
        Exhibit(
            "music",
            "acestep",
            check_music,
            fields={"prompt": PROMPT, "duration": MUSIC_SECONDS, "seed": 7},
        ),
    ]


def main() -> int:
    console = Console(highlight=False)
    _forget_other_inferq()
    try:
        try:
            results, heard = run(console)
        except InferqError as error:
            if error.code != "data_moved":
                raise
            shutil.rmtree(DATA)  # it holds only an earlier demo
            results, heard = run(console)
    except InferqError as error:
        console.print(f"The demo failed: {error}", style="red", markup=False)
        return 1
    reports = [report(exhibit, result, console) for exhibit, result in results]
    reports.append(show_callback(results[0][1], heard, console))
    reports.append(show_batch(console))
    right = all(reports)
    show_timings(results, console)
    console.print(f"Results, pictures and music are in {os.path.relpath(OUTPUT)}/", markup=False)
    console.print(
        "All results are right." if right else "Some results are wrong; see above.",
        style="green" if right else "red",
    )
    return 0 if right else 1


def run(console: Console) -> tuple[list[tuple[Exhibit, Result]], list[Heard]]:
    """Start everything, compute every exhibit, and stop everything. Gives the results and the callbacks."""
    begun = time.monotonic()
    shown = exhibits()
    types = tuple(sorted({exhibit.task_type for exhibit in shown}))
    options = UpOptions(DATA, PORT if port_free(PORT) else 0, types)
    starting = f"Starting RabbitMQ, Redis, the gateway and {len(types)} workers"
    if not console.is_terminal:
        console.print(starting)
    with console.status(starting) as status:

        def show_start(event: Report) -> None:
            line = f"{event.part}: {event.stage}"
            if console.is_terminal:
                status.update(line)
            else:
                console.print(f"  {line}")

        with while_up(options, report=show_start) as env:
            status.stop()
            console.print(f"inferq is up at {env['INFERQ_API_URL']} after {time.monotonic() - begun:.1f} s")
            secrets = WebhookSecrets(Path(env["INFERQ_WEBHOOK_SECRETS_FILE"]))
            with (
                listening(secrets) as (url, heard),
                Client(env["INFERQ_API_URL"], env["INFERQ_API_KEY"]) as client,
            ):
                results = compute(shown, client, console, url)
                compute_batch(client, console)
                end = time.monotonic() + CALLBACK_PATIENCE
                while not heard and time.monotonic() < end:
                    time.sleep(0.05)
            status.update("Stopping")
            status.start()
    return results, heard


@contextmanager
def listening(secrets: WebhookSecrets) -> Iterator[tuple[str, list[Heard]]]:
    """Receive callbacks for the length of a `with` block: gives the URL and the list of callbacks."""
    heard: list[Heard] = []
    listener = Listener(heard.append, secrets=lambda: secrets.of(TENANT))
    thread = threading.Thread(target=listener.serve)
    thread.start()
    try:
        yield listener.url, heard
    finally:
        listener.close()
        thread.join()


def show_callback(result: Result, heard: list[Heard], console: Console) -> bool:
    """Print the callback of a task's end; gives whether it came with a valid signature."""
    if not heard:
        console.print(f"callback: none came within {CALLBACK_PATIENCE:g} s", style="red", markup=False)
        return False
    got = heard[0]
    word = "signature verified" if got.verified else f"NOT verified: {got.fault}"
    text = f"{got.type} {got.subject_id}, sequence {got.sequence}, {word}\n{got.webhook_id}"
    console.print(Panel(Text(text), title="callback", title_align="left", expand=False))
    return got.verified and (got.type, got.subject_id) == (f"task.{result.status}", result.task_id)


def bars(console: Console) -> Progress:
    """A line for each piece of work: its name, how far it is, its state, and the time since."""
    columns = (TextColumn("  {task.description:<22}"), BarColumn(24), TextColumn("{task.fields[state]:<22}"))
    return Progress(*columns, TimeElapsedColumn(), console=console)


def compute(
    shown: Iterable[Exhibit], client: Client, console: Console, callback_url: str
) -> list[tuple[Exhibit, Result]]:
    """Submit every exhibit, follow each until it ends, and save its result and artifacts.

    The first one has a callback.
    """
    with bars(console) as progress:
        submitted = []
        for exhibit in shown:
            name = f"{exhibit.task_type} {exhibit.name}"
            bar = progress.add_task(name, total=1.0, state="uploading")
            urls = {field: client.upload(path) for field, path in exhibit.files.items()}
            url = None if submitted else callback_url
            task = client.submit(exhibit.task_type, callback_url=url, **urls, **exhibit.fields)
            progress.update(bar, state="submitted")
            submitted.append((exhibit, task.task_id, bar))
        results = []
        for exhibit, task_id, bar in submitted:
            for event in client.events(task_id):
                note = event.data.note or ""
                progress.update(
                    bar, completed=event.data.progress or 0.0, state=f"{event.data.state} {note}"[:22]
                )
            result = client.result(task_id, wait=PATIENCE)
            progress.update(bar, completed=1.0, state=result.status)
            keep(client, exhibit, result)
            results.append((exhibit, result))
    return results


def compute_batch(client: Client, console: Console) -> None:
    """Run a small batch with one broken line, and save its two files."""
    lines = [
        json.dumps({"text": f"{number}：{TEXT}"}, ensure_ascii=False) for number in range(1, BATCH_LINES)
    ]
    lines.insert(6, '{"text": "a broken line"')
    batch = client.submit_batch("\n".join(lines).encode(), task_type="ner")
    with bars(console) as progress:
        bar = progress.add_task(f"batch of {len(lines)} lines", total=len(lines), state="submitted")
        end = time.monotonic() + PATIENCE
        while not (status := client.batch(batch.batch_id)).ended and time.monotonic() < end:
            progress.update(bar, completed=status.counts.done or 0, state=status.state)
            time.sleep(0.2)
        progress.update(bar, completed=status.counts.done or 0, state=status.state)
    BATCH_FOLDER.mkdir(parents=True, exist_ok=True)
    client.batch_file(batch.batch_id, "output", BATCH_FOLDER)
    client.batch_file(batch.batch_id, "errors", BATCH_FOLDER)


def show_batch(console: Console) -> bool:
    """Print the batch's files; gives whether the good lines have their names, and the broken one its error."""
    output, errors = (
        [json.loads(line) for line in (BATCH_FOLDER / name).read_text(encoding="utf-8").splitlines()]
        for name in ("output.jsonl", "errors.jsonl")
    )
    shown = [f"output.jsonl: {len(output)} lines of names"]
    shown += [f"errors.jsonl: line {entry['line']}: {entry['error']['message']}" for entry in errors]
    console.print(Panel(Text("\n".join(shown)), title="batch", title_align="left", expand=False))
    whole = [number for number in range(1, BATCH_LINES + 1) if number != 7]
    names = [{e["text"] for e in entry["output"]["texts"][0]["entities"]} for entry in output]
    right = [entry["line"] for entry in output] == whole and [entry["line"] for entry in errors] == [7]
    if not right or not all({"李明", "王芳"} <= found for found in names):
        console.print("batch: it should have the names of each line but line 7", style="red", markup=False)
        return False
    return True


def keep(client: Client, exhibit: Exhibit, result: Result) -> None:
    """Write the result and its artifacts to the exhibit's folder."""
    exhibit.folder.mkdir(parents=True, exist_ok=True)
    (exhibit.folder / "result.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for artifact in result.artifacts:
        client.download(result.task_id, artifact.name, exhibit.folder / artifact.name)


def report(exhibit: Exhibit, result: Result, console: Console) -> bool:
    """Print a task's result; gives whether it is right."""
    if result.status != "succeeded" or not isinstance(result.output, dict):
        why = f": {result.error.message} ({result.error.code})" if result.error else ""
        console.print(f"{exhibit.name}: {result.status}{why}", style="red", markup=False)
        return False
    return exhibit.check(exhibit, result, console)


def check_page(exhibit: Exhibit, result: Result, console: Console) -> bool:
    """Print the page's text; gives whether every line was read correctly."""
    read = _output(result)["text"].splitlines()
    show(console, exhibit, "\n".join(read))
    right = there(exhibit, "annotated.png", console)
    expected = (PAGES / f"{exhibit.name}.txt").read_text(encoding="utf-8").splitlines()
    differences = [
        line
        for line in difflib.ndiff([plain(line) for line in expected], [plain(line) for line in read])
        if line.startswith(("- ", "+ "))
    ]
    if differences:
        console.print(f"{exhibit.name}: expected (-) and read (+) differ:", style="red", markup=False)
        console.print("\n".join(differences), markup=False)
    return right and not differences


def check_names(exhibit: Exhibit, result: Result, console: Console) -> bool:
    """Print the names; gives whether all were found, at their places in the text."""
    found = _output(result)["texts"][0]["entities"]
    table = Table("type", "text", "from", "to", box=None, pad_edge=False)
    for entity in found:
        table.add_row(entity["type"], entity["text"], str(entity["start"]), str(entity["end"]))
    console.print(Panel(table, title=f"names in {TEXT}", title_align="left", expand=False))
    right = all(TEXT[e["start"] : e["end"]] == e["text"] for e in found)
    if {(e["text"], e["type"]) for e in found} != NAMES or not right:
        console.print(f"{exhibit.name}: they should be {sorted(NAMES)}", style="red", markup=False)
        return False
    return True


def check_portrait(exhibit: Exhibit, result: Result, console: Console) -> bool:
    """Whether the picture has the target's size, and differs from the target."""
    output = _output(result)
    if not there(exhibit, output["image"], console):
        return False
    with (
        Image.open(exhibit.folder / output["image"]) as made,
        Image.open(exhibit.files["target_url"]) as target,
    ):
        right = made.size == target.size and made.convert("RGB").tobytes() != target.convert("RGB").tobytes()
        preview = "a preview: warped and blended, no model" if output["preview"] else "FaceFusion"
        show(console, exhibit, f"{output['image']}, {made.width} x {made.height} ({preview})")
    return right


def check_music(exhibit: Exhibit, result: Result, console: Console) -> bool:
    """Whether the music has the requested length and an audible level, and its picture exists."""
    output = _output(result)
    if not (there(exhibit, "audio.wav", console) and there(exhibit, "waveform.png", console)):
        return False
    with wave.open(str(exhibit.folder / "audio.wav")) as audio:
        seconds = audio.getnframes() / audio.getframerate()
    what = "made by a model" if output["ai"] else "a preview: a synthesizer, no AI"
    show(console, exhibit, f"audio.wav, {seconds:g} s, {output['peak_dbfs']:.1f} dBFS ({what}), waveform.png")
    return seconds == MUSIC_SECONDS and -20 < output["peak_dbfs"] < 0


def show(console: Console, exhibit: Exhibit, text: str) -> None:
    console.print(Panel(Text(text), title=exhibit.name, title_align="left", expand=False))


def there(exhibit: Exhibit, name: str, console: Console) -> bool:
    """Whether an artifact exists; prints a message if it does not."""
    if (exhibit.folder / name).is_file():
        return True
    console.print(f"{exhibit.name}: there is no {name}", style="red", markup=False)
    return False


def _output(result: Result) -> dict[str, Any]:
    if not isinstance(result.output, dict):
        raise TypeError("the output is not an object")
    return result.output


def plain(line: str) -> str:
    """A line without spaces, and with full-width letters and punctuation as their usual forms."""
    return "".join(unicodedata.normalize("NFKC", line).split())


def show_timings(results: Iterable[tuple[Exhibit, Result]], console: Console) -> None:
    """Print the seconds of each stage of each task."""
    table = Table("task", title="Seconds", title_justify="left")
    for stage in ("queued", "fetch", "inference", "upload", "total"):
        table.add_column(stage, justify="right")
    for exhibit, result in results:
        timings = result.timings
        total = (result.finished_at - result.created_at).total_seconds() if result.created_at else None
        stages = (timings.queued, timings.fetch, timings.inference, timings.upload, total)
        table.add_row(exhibit.name, *("" if seconds is None else f"{seconds:.3f}" for seconds in stages))
    console.print(table)


def _forget_other_inferq() -> None:
    # The shell may have sourced another inferq's `env`, or set a proxy: neither may redirect the demo.
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
