"""OCR pages per second: through the whole system, and by the bare engine in a loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.site import Site
from broker import Publisher, task_message, topology_for
from consumers.engine import Context, InputFile
from consumers.ocr.engine import OcrEngine
from schemas import parse_task
from storage import upload_key

PAGES = sorted((Path(__file__).parent.parent / "examples" / "pages").glob("*.png"))


@dataclass(frozen=True)
class Rates:
    """Pages per second, medians of the rounds; `ratio` is the median of each round's own ratio."""

    whole: float
    bare: float
    ratio: float


def pages_per_second(site: Site, *, pages: int, rounds: int) -> Rates:
    """The whole system beside the bare engine, in short rounds that alternate.

    Both run the same engine in one process at a time; the other is idle, but for its memory. A round's two
    sides follow each other within seconds: a slow spell of the machine hits both, and their ratio little.
    """
    whole, bare = [], []
    store, results = site.store(), site.results()
    for page in PAGES:
        store.put(upload_key("default", page.name), page, content_type="image/png")
    publisher = Publisher(site.broker(), name="bench", topology=topology_for(["ocr"]))
    publisher.start()
    with _bare_engine() as run, site.inferq_worker("ocr", INFERQ_LANES="normal"):
        for round_number in range(-1, rounds):  # the first warms both up
            names = [f"ocr-{round_number}-{n}" for n in range(pages)]
            for n, name in enumerate(names):
                url = f"inferq:{PAGES[n % len(PAGES)].name}"
                task = parse_task({"task_id": name, "task_type": "ocr", "image_url": url})
                publisher.publish(task_message(task)).result(20)
            ended = []
            for name in names:
                while (result := results.load("default", name)) is None:
                    time.sleep(0.02)
                if result.status != "succeeded" or result.started_at is None:
                    raise RuntimeError(f"{name}: {result.error}")
                ended.append(result)
            first = min(r.started_at for r in ended if r.started_at)
            seconds = (max(r.finished_at for r in ended) - first).total_seconds()
            began = time.perf_counter()
            for n in range(pages):
                run(PAGES[n % len(PAGES)])
            bare_seconds = time.perf_counter() - began
            if round_number >= 0:
                whole.append(pages / seconds)
                bare.append(pages / bare_seconds)
    publisher.close()
    ratios = [w / b for w, b in zip(whole, bare, strict=True)]
    return Rates(statistics.median(whole), statistics.median(bare), statistics.median(ratios))


@contextmanager
def _bare_engine() -> Iterator[Callable[[Path], None]]:
    """The engine itself, as a program of its own would call it."""
    engine = OcrEngine()
    engine.load()
    engine.warm_up()
    task = parse_task({"task_id": "bare", "task_type": "ocr", "image_url": "inferq:bare"})
    with tempfile.TemporaryDirectory() as folder:

        def run(page: Path) -> None:
            given = InputFile(page, page.stat().st_size, "image/png")
            engine.run(
                task,  # type: ignore[arg-type]
                Context(
                    folder=Path(folder),
                    inputs={"image_url": given},
                    report=lambda _fraction, _note: None,
                    abort_requested=lambda: False,
                ),
            )

        yield run
    engine.close()
