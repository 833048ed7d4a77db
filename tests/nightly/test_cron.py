"""When schedules are due, through both nights of daylight saving in Berlin: 29 March and 25 October 2026."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferq.schemas.cron import Cron

BERLIN = ZoneInfo("Europe/Berlin")
EXPRESSIONS = (
    "30 1 * * *",
    "30 2 * * *",
    "15,45 2 * * *",
    "0 * * * *",
    "*/30 * * * *",
    "0 3 1 * *",
    "0 0 29 2 *",
    "5 4 * * SUN",
)

moments = st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def due(cron: Cron, start: str, end: str) -> list[str]:
    """The times between two days of Berlin, as the clock on the wall shows them, with the offset."""
    begin, until = (datetime.fromisoformat(day).replace(tzinfo=BERLIN) for day in (start, end))
    found = []
    for moment in cron.after(begin - timedelta(seconds=1)):
        if moment >= until:
            return found
        found.append(f"{moment.astimezone(BERLIN):%H:%M%z}")
    return found


@pytest.mark.parametrize(
    ("expression", "spring"),
    [
        ("30 1 * * *", ["01:30+0100"]),
        ("30 2 * * *", ["03:00+0200"]),
        ("15,45 2 * * *", ["03:00+0200"]),
        ("0 1-4 * * *", ["01:00+0100", "03:00+0200", "04:00+0200"]),
    ],
)
def test_a_time_in_the_missing_hour_comes_right_after_it_once(expression: str, spring: list[str]) -> None:
    assert due(Cron(expression, "Europe/Berlin"), "2026-03-29", "2026-03-30") == spring


def test_an_hourly_run_has_23_hours_in_spring_and_25_in_autumn() -> None:
    hourly = Cron("0 * * * *", "Europe/Berlin")
    spring = due(hourly, "2026-03-29", "2026-03-30")
    autumn = due(hourly, "2026-10-25", "2026-10-26")
    assert len(spring) == 23
    assert "02:00+0100" not in spring
    assert len(autumn) == 25
    assert autumn[2:4] == ["02:00+0200", "02:00+0100"]


@pytest.mark.parametrize("expression", ["30 2 * * *", "30 1 * * *", "0 0 * * *", "59 2 * * SUN"])
def test_a_time_in_the_hour_that_comes_twice_comes_once(expression: str) -> None:
    times = due(Cron(expression, "Europe/Berlin"), "2026-10-25", "2026-10-26")
    assert len(times) == 1
    assert times[0].endswith("+0200")


def test_a_run_of_the_first_passing_does_not_come_again_from_within_the_second() -> None:
    second = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)  # 02:10, winter time
    coming = next(Cron("30 2 * * *", "Europe/Berlin").after(second))
    assert coming == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


@settings(max_examples=40)
@given(st.sampled_from(EXPRESSIONS), moments)
def test_times_come_in_order_and_none_twice(expression: str, start: datetime) -> None:
    times = list(islice(Cron(expression, "Europe/Berlin").after(start), 20))
    assert times[0] > start
    assert all(earlier < later for earlier, later in pairwise(times))
    assert all(moment.tzinfo is UTC for moment in times)


@settings(max_examples=40)  # a look at each time takes its time
@given(st.sampled_from(EXPRESSIONS), moments, st.integers(0, 400), st.integers(0, 4000))
def test_the_latest_is_the_last_that_stepping_on_would_find(
    expression: str, start: datetime, hours: int, minutes: int
) -> None:
    cron = Cron(expression, "Europe/Berlin")
    until = start + timedelta(hours=hours, minutes=minutes)
    last = None
    for moment in cron.after(start):
        if moment > until:
            break
        last = moment
    assert cron.latest(start, until) == last


@pytest.mark.parametrize("expression", ["0 0 31 2 *", "0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 30,31 FEB *"])
def test_a_cron_that_never_fires_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="never fires"):
        Cron(expression)


def test_a_leap_day_fires() -> None:
    assert next(Cron("0 0 29 2 *").after(datetime(2026, 1, 1, tzinfo=UTC))).year == 2028


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "0 fields"),
        ("@daily", "1 fields"),
        ("0 0 0 * * *", "6 fields"),
        ("60 1 * * *", "minute"),
        ("0 24 * * *", "hour"),
        ("0 0 32 * *", "day-of-month"),
        ("0 0 * 13 *", "month"),
        ("0 0 * * MOO", "day-of-week"),
    ],
)
def test_what_is_no_cron_is_refused_with_what_is_wrong(expression: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Cron(expression)
    assert "never fires" not in str(caught.value)


def test_a_cron_in_no_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="Europe/Berlin"):
        Cron("0 1 * * *", "Europe/Berln")
