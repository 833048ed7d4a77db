"""`inferq plan`: workers, hours and money from measured seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from typer.testing import CliRunner

from inferq.consumers.worker.metrics import WorkerMetrics
from inferq.producer.capacity import Capacity, Measured, parse_rate, parse_share, parse_span
from inferq.producer.cli.main import app
from inferq.producer.cli.plan import measured_of
from inferq.producer.client.sync_client import Client
from inferq.schemas import InvalidTask
from inferq.schemas.monitor import Demand, TypeDemand
from tests.installation import inferq_here

numbers = st.decimals(min_value="0.001", max_value="100000", places=3).map(Fraction)
shares = st.decimals(min_value="0", max_value="0.95", places=2).map(Fraction)
counts = st.integers(1, 10**7)
capacities = st.builds(
    lambda seconds, slots, reserve, price: Capacity(Measured({"x": seconds}, "a test"), slots, reserve, price),
    numbers, st.integers(1, 8), shares, numbers,
)  # fmt: skip


def workers_of_batch(capacity: Capacity, tasks: int, within: Fraction) -> int | None:
    try:
        return capacity.for_batch(tasks, within=within).workers
    except InvalidTask:
        return None


@settings(max_examples=40)
@given(capacities, numbers)
def test_the_workers_for_a_rate_are_just_enough(capacity: Capacity, rate: Fraction) -> None:
    plan = capacity.for_rate(rate)
    each = capacity.slots * (1 - capacity.reserve) / capacity.measured.seconds
    assert plan.workers * each >= rate > (plan.workers - 1) * each


@settings(max_examples=40)
@given(capacities, counts, numbers)
def test_the_workers_for_a_batch_are_just_enough(capacity: Capacity, tasks: int, within: Fraction) -> None:
    workers = workers_of_batch(capacity, tasks, within)
    assume(workers is not None)
    assert workers is not None
    assert capacity.for_batch(tasks, workers=workers).seconds <= within
    if workers > 1:
        assert capacity.for_batch(tasks, workers=workers - 1).seconds > within


@settings(max_examples=40)
@given(capacities, counts, counts, numbers, numbers)
def test_more_work_or_less_time_never_needs_fewer_workers_or_less_money(
    capacity: Capacity, tasks: int, more: int, within: Fraction, longer: Fraction
) -> None:
    workers = workers_of_batch(capacity, tasks, within)
    assume(workers is not None)
    assert workers is not None
    assert (workers_of_batch(capacity, tasks + more, within) or 0) >= workers
    assert (workers_of_batch(capacity, tasks, within + longer) or 0) <= workers
    one, all_ = (capacity.for_batch(count, workers=workers) for count in (tasks, tasks + more))
    assert (all_.seconds, all_.gpu_hours, all_.cost) >= (one.seconds, one.gpu_hours, one.cost)


@settings(max_examples=40)
@given(capacities, numbers, numbers, shares)
def test_slower_tasks_a_higher_rate_or_a_larger_reserve_never_need_fewer_workers(
    capacity: Capacity, rate: Fraction, more: Fraction, reserve: Fraction
) -> None:
    workers = capacity.for_rate(rate).workers
    slower = replace(capacity, measured=Measured({"x": capacity.measured.seconds + more}, "a test"))
    spared = replace(capacity, reserve=max(reserve, capacity.reserve))
    assert slower.for_rate(rate).workers >= workers
    assert capacity.for_rate(rate + more).workers >= workers
    assert spared.for_rate(rate).workers >= workers


@settings(max_examples=40)
@given(capacities, numbers, counts)
def test_money_is_hours_times_the_price(capacity: Capacity, rate: Fraction, tasks: int) -> None:
    assert capacity.price is not None
    for plan, done in (
        (capacity.for_rate(rate), rate * 86400), (capacity.for_batch(tasks, workers=3), Fraction(tasks)),
    ):  # fmt: skip
        assert plan.gpu_hours == plan.workers * plan.seconds / 3600
        assert plan.cost == plan.gpu_hours * capacity.price
        assert plan.cost_per_1000 == plan.cost / done * 1000
    assert replace(capacity, price=None).for_rate(rate).cost is None


def test_a_load_that_fits_exactly_needs_no_worker_more() -> None:
    tenth = Capacity(Measured({"x": Fraction("0.1")}, "a test"), reserve=Fraction("0.1"))
    assert tenth.for_rate(Fraction(9)).workers == 1
    assert tenth.for_batch(900, within=Fraction(100)).workers == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1d", 86400), ("2min", 120)]
)
def test_spans(text: str, seconds: int) -> None:
    assert parse_span("--within", text) == seconds


def test_rates_and_shares() -> None:
    assert [parse_rate("--rate", text) for text in ("5/s", "300/min", "0.5/h")] == [5, 5, Fraction(1, 7200)]
    assert parse_share("--reserve", "20%") == parse_share("--reserve", "0.2") == Fraction(1, 5)


# The command.


def plan(*arguments: str, status: int = 0) -> Any:
    printed = inferq_here({"COLUMNS": "200"}, "plan", *arguments)
    assert printed.returncode == status, printed.stderr
    if status:
        assert printed.stdout == ""
        return printed.stderr
    return json.loads(printed.stdout) if "--json" in arguments else printed.stdout


def test_each_line_shows_how_its_number_comes_about() -> None:
    batch = ["--seconds", "2.15", "--tasks", "100000", "--within", "8h", "--price", "2.5"]
    lines = [line.split() for line in plan(*batch).splitlines()]
    for line in (
        "tasks of a slot 10,716 28,800 s × 0.8 / 2.15 s, rounded down",
        "workers 10 100,000 / (10,716 × 1 slot), rounded up",
        "duration 7.465 h 10,000 tasks of a slot × 2.15 s / 0.8",
        "GPU hours 74.65 10 workers × 7.465 h, one GPU each",
        "cost 186.63 74.65 h × 2.50",
    ):
        assert line.split() in lines
    found = plan(*batch, "--json")
    assert (found["workers"], found["seconds"], found["cost"]) == (
        10,
        26875,
        pytest.approx(186.632, abs=0.001),
    )
    assert [step["name"] for step in found["steps"]][:2] == ["seconds per task", "reserve"]


def test_a_deadline_is_a_span_from_now() -> None:
    soon = (datetime.now(UTC) + timedelta(hours=8)).isoformat()
    by = plan("--seconds", "10", "--tasks", "10000", "--by", soon, "--json")
    within = plan("--seconds", "10", "--tasks", "10000", "--within", "8h", "--json")
    assert by["workers"] == within["workers"] == 5


def test_the_metrics_of_workers_say_what_a_task_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    files = []
    for number, computing in enumerate((2.0, 4.0)):
        metrics = WorkerMetrics()
        clock = metrics.add_engine("ocr")
        monkeypatch.setattr(clock, "_clock", lambda: now[0])
        clock.load(True)
        for step, then, seconds in (
            ("task", "input", 100.0), ("input", "computing", 1.0), ("computing", "result", computing),
            ("result", "task", 0.5),
        ):  # fmt: skip
            now[0] += seconds
            clock.move(step, then)  # type: ignore[arg-type]
        metrics.settled("ocr", "succeeded")
        metrics.settled("ocr", "retried")
        files.append(tmp_path / f"worker-{number}")
        files[-1].write_bytes(generate_latest(metrics.registry))
    options = [part for file in files for part in ("--metrics", str(file))]
    found = plan(*options, "--rate", "1/s", "--reserve", "0%", "--json")
    assert (found["seconds_per_task"], found["workers"]) == (
        4.5,
        5,
    )  # 3 s, 1 s for the input, 0.5 s for the result
    (how,) = [step["how"] for step in found["steps"] if step["name"] == "seconds per task"]
    assert how.startswith(
        "computing 3 + waiting for the input 1 + waiting for the result 0.5; mean of the 2 tasks"
    )


def test_a_benchmark_file_says_what_a_page_takes(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(
        "## OCR, pages per second: the whole system\n\n| inferq, queue to stored result | 1,250.50 | 0.9 |\n"
        "## NER, texts per second: the whole system\n\n| inferq, queue to stored result | 4.00 | 0.9 |\n"
    )
    found = plan("--benchmark", str(file), "--type", "ner", "--rate", "1/s", "--json")
    assert found["seconds_per_task"] == 0.25
    assert "give --type; there are measurements of: ner, ocr" in plan(
        "--benchmark", str(file), "--rate", "1/s", status=1
    )


def test_a_part_of_a_benchmark_without_a_rate_takes_no_other_parts_rate(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(
        "## OCR, pages per second: the whole system\n\nIt broke off.\n\n"
        "## NER, texts per second: the whole system\n\n| inferq, queue to stored result | 4.00 | 0.9 |\n"
    )
    found = plan("--benchmark", str(file), "--rate", "1/s", "--json")
    assert found["seconds_per_task"] == 0.25  # of the one part that has a rate


def test_for_what_waits_now_it_asks_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    ocr = TypeDemand(workers=4, ready=1200, unacked=3, unfed=0, oldest_seconds=61.5, task_seconds=2.15)
    found = Demand(
        target_wait=60, types={"ocr": ocr, "ner": TypeDemand(ready=7)}, unknown={"types.ner.workers": "why"}
    )
    asked: list[float | None] = []
    monkeypatch.setattr(Client, "demand", lambda _, *, target_wait: (asked.append(target_wait), found)[1])
    monkeypatch.setenv("INFERQ_API_KEY", "iq_test")
    ran = CliRunner().invoke(app, ["plan", "--waiting", "--within", "1m"])
    assert (ran.exit_code, asked) == (0, [60.0])
    _, first, second, reason = ran.output.splitlines()
    assert first.split() == ["ocr", "4", "1,200", "3", "0", "61.5", "2.15"]
    assert second.split() == ["ner", "?", "7", "?", "?", "?", "?"]
    assert reason == "?  types.ner.workers: why"
    ran = CliRunner().invoke(app, ["plan", "--waiting", "--type", "ner", "--json"])
    types = json.loads(ran.output)["types"]
    assert (types.keys(), types["ner"]["workers"], asked[-1]) == ({"ner"}, None, None)
    ran = CliRunner().invoke(app, ["plan", "--waiting", "--type", "xyz"])
    assert "--type 'xyz' was not measured; there are measurements of: ner, ocr" in str(ran.exception)


GIVEN = ["--seconds", "1"]
RATE = ["--rate", "1/s"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (RATE, "give one of --seconds, --metrics and --benchmark"),
        (GIVEN, "give a --rate, or --tasks with one of --within, --by and --workers"),
        ([*GIVEN, "--tasks", "5"], "give a --rate, or --tasks with one of"),
        ([*GIVEN, "--tasks", "5", "--within", "1h", "--workers", "1"], "with one of --within, --by and --workers"),
        ([*GIVEN, *RATE, "--tasks", "5"], "--rate is for a steady load"),
        (["--seconds", "0", *RATE], "the seconds per task must be above 0"),
        (["--seconds", "nan", *RATE], "--seconds 'nan' is not a number"),
        (["--seconds", "-1", *RATE], "--seconds '-1' is not a number"),
        ([*GIVEN, "--rate", "5"], "--rate '5' is not a rate; write 5/s"),
        ([*GIVEN, "--rate", "0/s"], "--rate must be above 0"),
        ([*GIVEN, *RATE, "--reserve", "100%"], "--reserve '100%' is not a share below 1"),
        ([*GIVEN, *RATE, "--slots", "0"], "--slots must be from 1 to 64"),
        ([*GIVEN, *RATE, "--price", "cheap"], "--price 'cheap' is not a number"),
        ([*GIVEN, "--tasks", "0", "--within", "1h"], "--tasks must be at least 1"),
        ([*GIVEN, "--tasks", "5", "--workers", "0"], "--workers must be at least 1"),
        ([*GIVEN, "--tasks", "5", "--within", "soon"], "--within 'soon' is not a span of time"),
        ([*GIVEN, "--tasks", "5", "--by", "2020-01-01T00:00Z"], "is in the past"),
        ([*GIVEN, "--tasks", "5", "--by", "tomorrow"], "is not a date and time"),
        (["--seconds", "700", "--tasks", "3", "--within", "10m"], "one task takes 875 s with the reserve, longer"),
        (["--metrics", "http://127.0.0.1:1/metrics", *RATE], "give the /metrics of a worker"),
        (["--waiting", *RATE], "--waiting goes with --within, --type and --json alone"),
        (["--metrics", "/no/such/page", *RATE], "/no/such/page: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_a_clear_error(arguments: list[str], said: str) -> None:
    assert said in plan(*arguments, status=1)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("", "no task has ended on these workers since they started"),
        ("<html>", "this is no page of Prometheus metrics"),
        ('inferq_worker_tasks_total{task_type="ocr",outcome="succeeded"} 3\n', "no task has ended"),
        ('inferq_worker_tasks_total{task_type="ocr",outcome="succeeded"} NaN\n', "no page of Prometheus metrics"),
    ],
)  # fmt: skip
def test_a_page_that_measures_nothing_is_a_clear_error(page: str, said: str) -> None:
    with pytest.raises(InvalidTask, match=said):
        measured_of([page], None, "a page")
