"""An engine's throughput: through the whole system, and in a plain loop."""

from __future__ import annotations

import itertools
import mimetypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.site import Site
from inferq.broker import Publisher, task_message, topology_for
from inferq.consumers.engine import Context, InputFile
from inferq.consumers.runtime.child import engine_class
from inferq.schemas import Task, get_type, new_task_id, parse_task
from inferq.storage import upload_key

PAGES = sorted((Path(__file__).parent.parent / "examples" / "pages").glob("*.png"))
SENTENCES = (
    "昨天下午，李明和王芳从北京来到上海，参观了上海交通大学。",
    "二〇二四年三月，港湾光学有限公司在青岛举行了新品发布会。",
    "张伟毕业于武汉大学，现在是广州市第一人民医院的医生。",
    "今年国庆节，赵静打算去成都看望她的外祖母。",
)


@dataclass(frozen=True)
class Work:
    """A task: its fields, the files of its inputs, and its number of units (pages, texts)."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    units: int = 1


@dataclass(frozen=True)
class Rates:
    """Units per second as medians of the rounds; `ratio` is the median of the rounds' ratios."""

    whole: float
    bare: float
    ratio: float


def ocr_pages(count: int) -> list[Work]:
    return [Work(files={"image_url": page}) for page in itertools.islice(itertools.cycle(PAGES), count)]


def ner_batches(count: int, texts: int = 64) -> list[Work]:
    given = list(itertools.islice(itertools.cycle(SENTENCES), texts))
    return [Work({"texts": given}, units=texts)] * count


def units_per_second(
    site: Site,
    type_name: str,
    work: Sequence[Work],
    *,
    rounds: int,
    bare_work: Sequence[Work] | None = None,
    **settings: str,
) -> Rates:
    """Compare the whole system with the bare engine, in short alternating rounds.

    Both sides run the same engine in a process each; while one computes, the other is idle in memory. The two
    sides of a round run within seconds of each other, so a slow phase hardly changes the ratio. `bare_work`: how the
    bare engine gets the same units, if not by the same tasks. `settings` are the worker's.
    """
    whole, bare = [], []
    units = sum(item.units for item in work)
    results = site.results()
    stored_inputs(site, work)
    publisher = Publisher(site.broker(), name="bench", topology=topology_for([type_name]))
    publisher.start()
    with bare_engine(type_name) as run, site.inferq_worker(type_name, INFERQ_LANES="normal", **settings):
        for round_number in range(-1, rounds):  # the first round is a warm-up
            ids = [new_task_id() for _ in work]
            sent = [
                publisher.publish(task_message(task_of(type_name, task_id, item)))
                for task_id, item in zip(ids, work, strict=True)
            ]
            for confirmed in sent:
                confirmed.result(20)
            ended = []
            for task_id in ids:
                while (result := results.load("default", task_id)) is None:
                    time.sleep(0.02)
                if result.status != "succeeded" or result.started_at is None:
                    raise RuntimeError(f"{task_id}: {result.error}")
                ended.append(result)
            first = min(r.started_at for r in ended if r.started_at)
            seconds = (max(r.finished_at for r in ended) - first).total_seconds()
            began = time.perf_counter()
            for item in bare_work or work:
                run(item)
            bare_seconds = time.perf_counter() - began
            if round_number >= 0:
                whole.append(units / seconds)
                bare.append(units / bare_seconds)
    publisher.close()
    ratios = [w / b for w, b in zip(whole, bare, strict=True)]
    return Rates(statistics.median(whole), statistics.median(bare), statistics.median(ratios))


def stored_inputs(site: Site, work: Sequence[Work]) -> None:
    """Upload the inputs of the tasks."""
    store = site.store()
    for path in {path for item in work for path in item.files.values()}:
        kind = mimetypes.guess_type(path.name)[0] or ""
        store.put(upload_key("default", path.name), path, content_type=kind)


def task_of(type_name: str, task_id: str, item: Work) -> Task:
    """The work as a task with this id."""
    urls = {name: f"inferq:{path.name}" for name, path in item.files.items()}
    return parse_task({"task_id": task_id, "task_type": type_name, **urls, **item.fields})


@contextmanager
def bare_engine(type_name: str) -> Iterator[Callable[[Work], None]]:
    """The loaded engine in this process, without a queue: a function that computes one piece of work."""
    engine = engine_class(get_type(type_name))()
    engine.load()
    engine.warm_up()
    with tempfile.TemporaryDirectory() as folder:

        def run(item: Work) -> None:
            engine.run(
                task_of(type_name, "bare", item),
                Context(
                    folder=Path(folder),
                    inputs={
                        name: InputFile(path, path.stat().st_size, "image/png")
                        for name, path in item.files.items()
                    },
                    report=lambda _fraction, _note: None,
                    abort_requested=lambda: False,
                ),
            )

        yield run
    engine.close()
