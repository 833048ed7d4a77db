"""`make bench`: measures both sides of each comparison, prints them, and writes RESULTS.md."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.engines import Rates
from benchmarks.site import Site, site

Say = Callable[[str], None]
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="do a tenth of the work, and write no file")
    arguments.add_argument("--only", choices=list(PARTS), action="append", help="run only this part")
    given = arguments.parse_args()
    parts = given.only or PARTS
    share = 10 if given.quick else 1
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say("# Benchmarks")
    say("")
    say("Made by `make bench`: both sides of each comparison in one run, on one broker and one machine.")
    say("Compare the ratios: machines differ and are noisy.")
    say("Longer measurements are in [MORE.md](MORE.md).")
    with site() as ground:
        os.environ.update(ground.environment())
        for part in parts:
            say("")
            PARTS[part](ground, share, say)
        say("")
        _machine(say)
    if not given.quick and not given.only:
        RESULTS.write_text("\n".join(lines) + "\n", "utf-8")
        print(f"written to {RESULTS}")


def _publish(ground: Site, share: int, say: Say) -> None:
    from benchmarks.contestants import Celery, Dramatiq, Inferq
    from benchmarks.measure import publish_rates

    contestants = [Inferq(ground), Celery(ground), Dramatiq(ground)]
    rates = publish_rates(
        contestants,
        count=lambda c: (20_000 if isinstance(c, Inferq) else 2_000) // share,
        rounds=3,
    )
    say("## Publishing, each task confirmed by the broker")
    say("")
    _table(say, "tasks/s", rates, reference=contestants[1].name)
    for contestant in contestants:
        contestant.close()


def _drain(ground: Site, share: int, say: Say) -> None:
    from benchmarks.contestants import Celery, Dramatiq, Inferq
    from benchmarks.measure import drain_rates

    contestants = [
        Inferq(ground, fsync=False),
        Inferq(ground, ahead=True),
        Inferq(ground),
        Inferq(ground, lanes="high,normal,low"),
        Inferq(ground, batch=32),
        Inferq(ground, lanes="high,normal,low", batch=32),
        celery := Celery(ground),
        Dramatiq(ground),
    ]
    rates = drain_rates(contestants, count=2_000 // share, rounds=3)
    say("## Draining through one worker, result recorded")
    say("")
    say(
        "inferq: quorum queue, engine in a process of its own, status in Redis, result as a file, one task at a time "
        "where nothing else is said:"
    )
    say("with fsync (the default), and without, because the others' Redis does not wait for the disk.")
    say("Celery: quorum queue, late acks, prefork, result in Redis. Dramatiq: classic queue, one thread.")
    say("")
    _table(say, "tasks/s", rates, reference=celery.name)
    for contestant in contestants:
        contestant.close()


def _latency(ground: Site, share: int, say: Say) -> None:
    from benchmarks.contestants import Celery, Dramatiq, Inferq
    from benchmarks.measure import idle_latencies

    contestants = [
        Inferq(ground), Inferq(ground, lanes="high,normal,low"), Inferq(ground, batch=32),
        celery := Celery(ground), Dramatiq(ground),
    ]  # fmt: skip
    found = idle_latencies(contestants, count=100 // share, rounds=4)
    say("## Idle latency: from before the publish to the start of the task's body")
    say("")
    p50 = {name: statistics.median(seconds) * 1000 for name, seconds in found.items()}
    p95 = {name: statistics.quantiles(seconds, n=20)[-1] * 1000 for name, seconds in found.items()}
    reference = celery.name
    say("| | p50 ms | p95 ms | p50, times Celery's |")
    say("| --- | ---: | ---: | ---: |")
    for name in found:
        say(f"| {name} | {p50[name]:.2f} | {p95[name]:.2f} | {p50[name] / p50[reference]:.2f} |")
    for contestant in contestants:
        contestant.close()


def _ocr(ground: Site, share: int, say: Say) -> None:
    from benchmarks.engines import ocr_pages, units_per_second

    rates = units_per_second(ground, "ocr", ocr_pages(4), rounds=16 if share == 1 else 1)
    _beside_bare(say, "OCR", "pages", "Rounds of four pages per side", rates)
    # Leaves a core to all the others, as an engine on a GPU does.
    os.environ["INFERQ_OCR_THREADS"] = "1"
    try:
        rates = units_per_second(
            ground, "ocr", ocr_pages(4), rounds=16 if share == 1 else 1, INFERQ_TAKE_AHEAD="true"
        )
    finally:
        del os.environ["INFERQ_OCR_THREADS"]
    say("")
    how = "The same with one engine thread on both sides, and tasks taken ahead"
    _beside_bare(say, "OCR with one thread", "pages", how, rates)


def _ner(ground: Site, share: int, say: Say) -> None:
    from benchmarks.engines import ner_batches, units_per_second

    rates = units_per_second(ground, "ner", ner_batches(20), rounds=16 if share == 1 else 2)
    _beside_bare(say, "NER", "texts", "Rounds of 20 tasks with 64 texts each per side", rates)
    say("")
    _small_ner(ground, share, say)


def _small_ner(ground: Site, share: int, say: Say) -> None:
    from benchmarks.engines import ner_batches, units_per_second

    single, rounds = ner_batches(640, texts=1), 8 if share == 1 else 1
    together = units_per_second(ground, "ner", single, bare_work=ner_batches(10), rounds=rounds)
    alone = units_per_second(
        ground, "ner", single, bare_work=ner_batches(10), rounds=rounds, INFERQ_BATCH_SIZE="1"
    )
    say("## NER, one text a task: batches of up to 64 tasks, beside one task at a time")
    say("")
    say("Rounds of 640 tasks, alternating with the bare engine, which gets its texts in batches of 64.")
    say("")
    say("| | texts/s | of the bare engine | times one task at a time |")
    say("| --- | ---: | ---: | ---: |")
    for name, rates in (("inferq, in batches", together), ("inferq, INFERQ_BATCH_SIZE=1", alone)):
        gain = rates.ratio / alone.ratio
        say(f"| {name} | {rates.whole:,.0f} | {rates.ratio:.3f} | {gain:.2f} |")
    say(f"| the engine in a `for` loop, 64 texts a call | {together.bare:,.0f} | 1 | |")


def _distance(ground: Site, share: int, say: Say) -> None:
    from benchmarks.distance import ROUND_TRIP_SECONDS, drain, far_away

    with far_away(ground) as far:
        near = dict(far) | {"INFERQ_AMQP_URL": ground.amqp_url, "INFERQ_S3_ENDPOINT_URL": far["NEAR_S3"]}
        one = {"INFERQ_BATCH_SIZE": "1"}
        say(f"## A worker {ROUND_TRIP_SECONDS * 1000:.0f} ms away from its broker and from S3")
        say("")
        say(
            "Tasks on all three lanes. A round trip to RabbitMQ and to a stand-in for S3 takes that long, by a proxy."
        )
        say("")
        say("| | tasks/s, empty tasks | engine busy, tasks of 0.1 s |")
        say("| --- | ---: | ---: |")
        for name, place, settings in (
            ("near, one task at a time", near, one),
            ("far, one task at a time", far, one),
            ("far, INFERQ_TAKE_AHEAD=1", far, one | {"INFERQ_TAKE_AHEAD": "1"}),
            ("far, INFERQ_TAKE_AHEAD=2", far, one | {"INFERQ_TAKE_AHEAD": "2"}),
            ("far, batches of 32", far, {}),
        ):
            given = {**place, **settings}
            empty = drain(ground, given, "clock", (640 if settings == {} else 60) // min(share, 2))
            long = drain(ground, given, "echo", 100 // min(share, 2), delay=0.1)
            say(f"| {name} | {empty.rate:,.1f} | {long.busy:.3f} |")


def _warmup(ground: Site, share: int, say: Say) -> None:
    from benchmarks.starts import WORK, starts

    say("## The first task after a start, from its delivery to its result, compared with later ones")
    say("")
    say("Medians and worst case of several starts; each start has its own median of later tasks.")
    say("")
    say("| | first, ms | later, ms | first / later | worst |")
    say("| --- | ---: | ---: | ---: | ---: |")
    for name in WORK:
        found = starts(ground, name, rounds=5 if share == 1 else 2, later=5 if share == 1 else 3)
        first, later = (
            statistics.median(seconds) * 1000 for seconds in zip(*map(astuple, found), strict=True)
        )
        ratios = [start.first / start.later for start in found]
        say(f"| {name} | {first:,.1f} | {later:,.1f} | {statistics.median(ratios):.2f} | {max(ratios):.2f} |")


def _from_zero(ground: Site, share: int, say: Say) -> None:
    from benchmarks.starts import WORK, from_zero

    say("## The first result from zero: from the start of a process, compared with the bare engine")
    say("")
    say(
        "The bare engine is a new interpreter that loads it and computes one task. The worker's task waits in the"
    )
    say("queue; it connects, warms its engine up, and stores the result. Medians of starts that take turns.")
    say("")
    say("| | bare engine, s | worker, s | times the bare engine |")
    say("| --- | ---: | ---: | ---: |")
    for name in WORK:
        found = from_zero(ground, name, rounds=5 if share == 1 else 1)
        bare, worker = (statistics.median(seconds) for seconds in zip(*map(astuple, found), strict=True))
        ratio = statistics.median(each.worker / each.bare for each in found)
        say(f"| {name} | {bare:.2f} | {worker:.2f} | {ratio:.2f} |")


def _feed(ground: Site, share: int, say: Say) -> None:
    from benchmarks.contestants import Celery
    from benchmarks.feed import feed

    celery = Celery(ground)
    begun = time.perf_counter()
    count = 2_000 // share
    celery.publish(count)
    celery_rate = count / (time.perf_counter() - begun)
    celery.close()
    fed = [feed(ground, 100_000 // share), feed(ground, 1_000_000 // share)]
    say("## Feeding a batch of echo lines, each task confirmed by the broker, from the file to the queue")
    say("")
    say("One feeder process, no worker. The table shows its peak memory, the batch's memory in Redis,")
    say("and the latency of the batch's status over HTTP, requested five times a second meanwhile.")
    say(
        "Late: the longest delay of the machine in waking the requesting thread; a reply takes several wake-ups."
    )
    say("")
    say("| lines | lines/s | times Celery | feeder, MB | Redis, MB | status p50, ms | p99 | max | late, ms |")
    say("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in fed:
        status = (one.status_p50, one.status_p99, one.status_max, one.late_max)
        say(
            f"| {one.lines:,} | {one.rate:,.0f} | {one.rate / celery_rate:.1f} | {one.feeder_peak / 1e6:.0f} "
            f"| {one.redis / 1e6:.2f} | {' | '.join(f'{1e3 * seconds:.1f}' for seconds in status)} |"
        )
    say("")
    say(f"Celery publishing the same tasks, each confirmed: {celery_rate:,.0f}/s.")


def _observe(ground: Site, share: int, say: Say) -> None:
    from benchmarks.measure import drain_rates, idle_latencies
    from benchmarks.observe import JSON_LOGS, QUIET, Observed, collector, submissions_per_second

    with collector() as traces:
        settings = {
            "no observation": (QUIET, False),
            "logs as JSON": (JSON_LOGS, False),
            "and metrics, read every 5 s": (JSON_LOGS, True),
            "and traces, 1 %": ({**JSON_LOGS, **traces}, True),
        }
        observed = [Observed(ground, name, given, read=read) for name, (given, read) in settings.items()]
        drain = drain_rates(observed, count=2_000 // share, rounds=3)
        waits = idle_latencies(observed, count=100 // share, rounds=2)
        latency = {name: statistics.median(seconds) * 1000 for name, seconds in waits.items()}
        accepted: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(3):
            for name, (given, read) in settings.items():
                accepted[name].append(submissions_per_second(ground, given, 2_000 // share, read=read))
        submit = {name: statistics.median(rates) for name, rates in accepted.items()}
        for each in observed:
            each.close()
    say("## What it costs to observe")
    say("")
    say(
        "One worker with one lane and without fsync, and one gateway with four clients. Each ratio compares with the "
        "first row."
    )
    say("")
    say("| observed | drain, tasks/s | | idle latency, p50 ms | | HTTP submissions/s | |")
    say("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in settings:
        row = [
            f"{rates[name]:,.{digits}f} | {rates[name] / rates['no observation']:.2f}"
            for rates, digits in ((drain, 0), (latency, 2), (submit, 0))
        ]
        say(f"| {name} | {' | '.join(row)} |")


def _gpu(ground: Site, share: int, say: Say) -> None:
    from benchmarks.gpu import simulated

    simulated(ground, share, say)


def _beside_bare(say: Say, what: str, unit: str, how: str, rates: Rates) -> None:
    say(f"## {what}, {unit} per second: the whole system against the bare engine in a loop")
    say("")
    say(f"{how}, alternating; the ratio is the median of the rounds' ratios.")
    say("")
    say(f"| | {unit}/s | of the bare engine |")
    say("| --- | ---: | ---: |")
    say(f"| inferq, queue to stored result | {rates.whole:,.2f} | {rates.ratio:.3f} |")
    say(f"| the engine in a `for` loop | {rates.bare:,.2f} | 1 |")


def _table(say: Say, unit: str, rates: dict[str, float], *, reference: str) -> None:
    say(f"| | {unit} | times {reference} |")
    say("| --- | ---: | ---: |")
    for name, rate in rates.items():
        say(f"| {name} | {rate:,.0f} | {rate / rates[reference]:.2f} |")


def _machine(say: Say) -> None:
    rabbitmq = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "rabbitmq-server"],
        capture_output=True,
        text=True,
        check=False,
    )
    say(
        f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, {platform.machine()}, {platform.system()} "
        f"{platform.release()}; Python {platform.python_version()}, "
        f"RabbitMQ {rabbitmq.stdout or 'of unknown version'}, pika {version('pika')}, "
        f"celery {version('celery')}, dramatiq {version('dramatiq')}, rapidocr {version('rapidocr')}."
    )


PARTS: dict[str, Callable[[Site, int, Say], None]] = {
    "publish": _publish,
    "drain": _drain,
    "latency": _latency,
    "ocr": _ocr,
    "ner": _ner,
    "from-zero": _from_zero,
    "warmup": _warmup,
    "feed": _feed,
    "observe": _observe,
    "distance": _distance,
    "gpu": _gpu,
}


if __name__ == "__main__":
    sys.exit(main())
