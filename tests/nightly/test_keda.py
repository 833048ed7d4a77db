"""`inferq nightly keda`: triggers that KEDA, by its own rules, has active from before a run is fed until after."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from inferq.producer.cli.main import app
from inferq.producer.nightly.keda import CronTrigger, NotExpressible, triggers_of
from inferq.schemas import InvalidTask
from inferq.schemas.cron import Cron
from inferq.schemas.schedule import Schedule

MONDAY = datetime(2026, 11, 2, tzinfo=UTC)
DAY = timedelta(days=1)
ZONES = st.sampled_from(
    ["UTC", "Asia/Tokyo", "America/New_York"]
)  # November: no clock changes but on the 1st
CLOCKS = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.sampled_from([0, 30, 59]))


def schedule(cron: str, **more: Any) -> Schedule:
    return Schedule(name="scans", cron=cron, source="s3://bucket/p/", task_type="ocr", **more)


def active(trigger: CronTrigger, at: datetime) -> bool:
    """KEDA's rule (pkg/scalers/cron_scaler.go): the next end comes before the next start."""
    start, end = (next(Cron(each, trigger.time_zone).after(at)) for each in (trigger.start, trigger.end))
    return end <= start


def feeds(of: Schedule) -> list[datetime]:
    """When the runs of a week and of two days before and after it are fed."""
    times = takewhile(lambda at: at < MONDAY + 9 * DAY, of.times.after(MONDAY - 2 * DAY))
    window = of.feeding_window
    return [at + timedelta(seconds=window.opens_in(at) if window else 0) for at in times]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 59), min_size=1, max_size=2),
    st.lists(st.integers(0, 23), min_size=1, max_size=2),
    st.just("*") | st.lists(st.integers(0, 7), min_size=1, max_size=3),
    ZONES, st.none() | st.tuples(CLOCKS, CLOCKS), st.integers(1, 600), st.integers(1, 600),
)  # fmt: skip
def test_triggers_are_active_around_the_start_of_feeding_and_at_no_other_time(
    minutes: list[int], hours: list[int], weekdays: Any, zone: str, window: Any, lead: int, hold: int
) -> None:
    fields = [",".join(map(str, each)) for each in (minutes, hours)]
    days = weekdays if weekdays == "*" else ",".join(map(str, weekdays))
    given = schedule(
        f"{' '.join(fields)} * * {days}", time_zone=zone, window=None if window is None else "-".join(window)
    )
    triggers = triggers_of(given, lead=lead, hold=hold)
    spans = [(at - timedelta(minutes=lead), at + timedelta(minutes=hold)) for at in feeds(given)]
    for begin, end in spans:
        for moment in (begin, end - timedelta(minutes=1)):
            assert any(active(trigger, moment) for trigger in triggers), moment
    for hour in range(0, 7 * 24, 11):
        moment = MONDAY + timedelta(hours=hour, minutes=7, seconds=30)
        expected = any(begin <= moment < end for begin, end in spans)
        assert any(active(trigger, moment) for trigger in triggers) == expected, moment


@pytest.mark.parametrize(
    ("cron", "window", "start", "end"),
    [
        ("30 1 * * MON-FRI", None, "20 1 * * 1,2,3,4,5", "0 2 * * 1,2,3,4,5"),
        ("0 0 * * 1", None, "50 23 * * 0", "30 0 * * 1"),
        ("0 21 * * *", "22:00-06:00", "50 21 * * *", "30 22 * * *"),
        ("0 8 * * 7", "02:00-06:00", "50 1 * * 1", "30 2 * * 1"),
        ("0 0 1 * *", None, "0 0 1 * *", "30 0 1 * *"),
        ("50 23 1 6,12 *", None, "40 23 1 6,12 *", "59 23 1 6,12 *"),
        ("0 3 1-31 * 1", None, "50 2 * * *", "30 3 * * *"),
        ("0 3 13 * 5", None, "50 2 13 * 5", "30 3 13 * 5"),
    ],
    ids=["weekdays", "lead before midnight", "window opens later", "window opens on the next day",
         "a day of the month: no lead", "a day of the month: a short hold", "every day", "either day"],
)  # fmt: skip
def test_a_trigger_has_the_times_that_cron_can_say(
    cron: str, window: str | None, start: str, end: str
) -> None:
    (trigger,) = triggers_of(schedule(cron, window=window), lead=10, hold=30)
    assert (trigger.start, trigger.end) == (start, end)


@pytest.mark.parametrize(
    ("cron", "window", "reason"),
    [
        ("*/30 * * * *", None, "over 12 times a day"),
        ("0 3 L * *", None, "has no `L`"),
        ("0 3 * * 5#1", None, "has no `L`, `W` and `#`"),
        ("0 3 */2 * 1", None, "both the day of the month and the day of the week"),
        ("0 8 1 * *", "02:00-06:00", "opens on the day after"),
    ],
)
def test_what_keda_cannot_express_is_left_out_with_the_reason(
    cron: str, window: str | None, reason: str
) -> None:
    with pytest.raises(NotExpressible, match=re.escape(reason)):
        triggers_of(schedule(cron, window=window), lead=10, hold=30)


FILE = """
[more-scans]
cron = "0 1,2 * * *"
time_zone = "Europe/Berlin"
source = "s3://bucket/scans/"
task_type = "ocr"
[more_scans]
cron = "0 3 * * *"
source = "s3://bucket/others/"
task_type = "ocr"
[often]
cron = "* * * * *"
source = "s3://bucket/often/"
task_type = "ocr"
[texts]
cron = "0 3 * * *"
source = "s3://bucket/texts.jsonl"
defaults = {task_type = "ner"}
[mixed]
cron = "0 3 * * *"
source = "s3://bucket/mixed.jsonl"
"""


def test_it_prints_a_patch_of_each_types_scaled_object(tmp_path: Path) -> None:
    path = tmp_path / "schedules.toml"
    path.write_text(FILE)

    def printed(*arguments: str) -> str:
        ran = CliRunner().invoke(app, ["nightly", "keda", str(path), *arguments])
        assert ran.exit_code == 0, ran.exception
        return ran.output

    text = printed("--replicas", "3")
    ocr, ner = yaml.safe_load_all(text)
    triggers = [each["value"] for each in ocr[:-1]]
    assert [each["name"] for each in triggers] == [
        "night_more_scans",
        "night_more_scans_2",
        "night_more_scans_",
    ]
    assert triggers[0] == {
        "type": "cron", "name": "night_more_scans",
        "metadata": {
            "timezone": "Europe/Berlin", "start": "50 0 * * *", "end": "30 1 * * *", "desiredReplicas": "3",
        },
    }  # fmt: skip
    assert ocr[-1] == {
        "op": "replace", "path": "/spec/advanced/scalingModifiers/formula",
        "value": "max(max(total / 4, total - waiting), night_more_scans, night_more_scans_2, night_more_scans_)",
    }  # fmt: skip
    assert [each["op"] for each in ner] == ["add", "replace"]
    assert "# mixed: has no task_type" in text
    assert "# often: '* * * * *' has over 12 times a day" in text
    (only,) = yaml.safe_load_all(printed("--type", "ner", "--formula", "demand", "--lead", "1h"))
    assert only[0]["value"]["metadata"]["start"] == "0 2 * * *"
    assert only[1]["value"] == "max(demand, night_texts)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--type", "acestep"], "task types of the schedules: ner, ocr"),
        (["--lead", "12h"], "--lead '12h' is not from 1m to 11h"),
        (["--hold", "10s"], "--hold '10s' is not from 1m to 11h"),
    ],
)
def test_what_cannot_be_printed_is_a_clear_error(tmp_path: Path, arguments: list[str], said: str) -> None:
    path = tmp_path / "schedules.toml"
    path.write_text(FILE)
    ran = CliRunner().invoke(app, ["nightly", "keda", str(path), *arguments])
    assert isinstance(ran.exception, InvalidTask)
    assert said in str(ran.exception)
