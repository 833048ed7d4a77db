"""schedules.toml: what it may say, and how each fault is named by its table and key."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from inferq.producer.nightly import SchedulesUnusable, read_schedules
from inferq.schemas import installed_types
from inferq.schemas.schedule import run_id_of

GOOD = """
[invoices]
cron = "30 1 * * *"
time_zone = "Europe/Berlin"
source = "s3://scans/invoices/"
task_type = "ocr"
options = { annotated = true }
priority = "low"
window = "01:00-06:00"
max_in_flight = 200
callback = "https://example.com/nights"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "schedules.toml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(folder: Path, text: str) -> str:
    with pytest.raises(SchedulesUnusable) as caught:
        read_schedules(written(folder, text))
    return caught.value.message


def changed(key: str, value: str) -> str:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key} =")]
    return "\n".join([*lines, f"{key} = {value}"])


def test_a_table_is_a_schedule(tmp_path: Path) -> None:
    schedule = read_schedules(written(tmp_path, GOOD))["invoices"]
    batch = schedule.batch(datetime(2026, 11, 25, 0, 30, tzinfo=UTC))
    assert batch.batch_id == "invoices-20261125T003000Z"
    assert batch.window is not None
    assert (batch.window.start, batch.window.time_zone) == ("01:00", "Europe/Berlin")
    assert batch.defaults == {"options": {"annotated": True}}
    assert (batch.schedule, batch.priority, batch.max_in_flight) == ("invoices", "low", 200)
    assert schedule.only_new


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert list(read_schedules(written(tmp_path, "\ufeff" + GOOD))) == ["invoices"]


def test_a_run_has_the_same_id_in_whatever_zone_its_time_is_told() -> None:
    moment = datetime.fromisoformat("2026-11-25T01:30:00+01:00")
    assert run_id_of("a", moment) == run_id_of("a", moment.astimezone(UTC)) == "a-20261125T003000Z"


def test_a_file_of_tasks_is_taken_whole(tmp_path: Path) -> None:
    text = '[a]\ncron = "0 1 * * *"\nsource = "s3://scans/tasks.jsonl"\n'
    assert not read_schedules(written(tmp_path, text))["a"].only_new


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cron", '"0 0 31 2 *"', "invoices.cron: '0 0 31 2 *' never fires"),
        ("cron", '"0 25 * * *"', "invoices.cron"),
        ("cron", "5", "invoices.cron"),
        (
            "time_zone",
            '"Europe/Berln"',
            "invoices.time_zone: there is no time zone 'Europe/Berln'; near it are",
        ),
        ("source", '"/data/scans"', "invoices.source: give s3://bucket/prefix, or s3://bucket/file.jsonl"),
        ("source", '"s3:scans"', "invoices"),
        ("source", '"s3://scans/../in/"', "invoices: source s3://scans/../in/"),
        ("source", '"s3://my_bucket/in/"', "invoices: source s3://my_bucket/in/"),
        ("source", '"s3://ab/in/"', "invoices: source s3://ab/in/"),
        ("source", '"s3://ab"', "invoices: source s3://ab"),
        ("window", '"1-6"', "invoices.window: write the window as 22:00-06:00"),
        ("window", '"01:00"', "invoices.window: write the window as 22:00-06:00"),
        ("priority", '"urgent"', "invoices.priority"),
        ("max_in_flight", "0", "invoices.max_in_flight"),
        ("callback", '"ftp://example.com"', "invoices.callback: give an http:// or https:// URL"),
        ("tenant", '"a/b"', "invoices.tenant: a tenant's name is 1-64 of"),
        ("task_type", '"orc"', "orc"),
        ("task_type", '"OCR"', "invoices.task_type: give the name of a task type, such as ocr"),
        ("options", "{ layuot = true }", "layuot"),
        ("when", '"now"', "invoices.when: is unknown; known keys are cron, time_zone, source"),
        ("name", '"x"', "invoices.name"),
        ("defaults", "{ at = 2026-01-01 }", "invoices.defaults"),
    ],
)
def test_each_fault_is_named_by_table_and_key(tmp_path: Path, key: str, value: str, words: str) -> None:
    message = fault(tmp_path, changed(key, value))
    assert words in message
    assert "pattern" not in message


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('task_type = "orc"', "a: task_type 'orc' is not known here"),
        ('task_type = "ocr"\noptions = { layuot = true }', "a: options.layuot: is unknown"),
        ('task_type = "ocr"\noptions = { annotated = "perhaps" }', "a: options.annotated: "),
        ('task_type = "ocr"\ndefaults = { imege_url = "inferq:x" }', "a: imege_url: is unknown"),
        ('defaults = { task_type = ["ocr"] }', "is not known here"),
        ('defaults = { priority = "urgent" }', "a: priority: input should be 'high', 'normal' or 'low'"),
    ],
)
def test_what_a_file_of_tasks_has_for_defaults_is_checked_too(tmp_path: Path, said: str, words: str) -> None:
    assert words in fault(tmp_path, f'[a]\ncron = "0 1 * * *"\nsource = "s3://scans/in.jsonl"\n{said}\n')


@pytest.mark.parametrize("task_type", [*installed_types()])
def test_what_the_lines_of_a_file_may_say_is_not_missed(tmp_path: Path, task_type: str) -> None:
    text = f'[a]\ncron = "0 1 * * *"\nsource = "s3://scans/in.jsonl"\ntask_type = "{task_type}"\n'
    assert read_schedules(written(tmp_path, text))["a"].task_type == task_type


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, 'x = 1\n[a]\ncron = "0 1 * * *"\n["b c"]\ncron = "x"\nsource = "s3://b/"\n')
    for words in ("x: is outside a table", "a.source: is missing", "b c: a schedule's name", "b c.cron"):
        assert words in message


def test_what_is_not_toml_is_told_with_its_line(tmp_path: Path) -> None:
    assert "line 2" in fault(tmp_path, "[a]\ncron = 1 2\n")


def test_a_file_that_is_not_there_is_told_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(SchedulesUnusable, match="INFERQ_SCHEDULES_FILE"):
        read_schedules(tmp_path / "none.toml")
