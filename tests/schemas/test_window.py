"""The hours in which a batch is fed: over midnight, and through both nights of daylight saving."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inferq.schemas import Window, time_zone

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "America/Nuuk")

clocks = st.builds(lambda hour, minute: f"{hour:02}:{minute:02}", st.integers(0, 23), st.integers(0, 59))
windows = st.builds(lambda start, end, zone: Window(start=start, end=end, time_zone=zone),
                    clocks, clocks, st.sampled_from(ZONES))  # fmt: skip
moments = st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


def night(start: str, end: str) -> Window:
    return Window(start=start, end=end, time_zone="Europe/Berlin")


@given(windows, moments)
def test_a_window_is_open_once_the_time_until_it_opens_has_passed(window: Window, now: datetime) -> None:
    wait = window.opens_in(now)
    assert 0 <= wait <= 50 * 3600
    assert window.is_open(now) == (wait == 0)
    assert window.is_open(now + timedelta(seconds=wait))
    if wait > 0:
        assert not window.is_open(now + timedelta(seconds=wait) - timedelta(microseconds=1))


@given(windows, moments)
def test_a_window_closes_after_it_opened_and_is_shut_then(window: Window, now: datetime) -> None:
    closes = window.closes_after(now)
    if window.start == window.end:
        assert closes is None
        assert window.is_open(now)
        return
    assert closes is not None
    assert closes > now
    assert window.is_open(closes - timedelta(microseconds=1))


@given(windows, moments)
def test_a_night_keeps_its_name_until_the_next_one_opens(window: Window, now: datetime) -> None:
    if window.start == window.end:
        return
    opens = now + timedelta(seconds=window.opens_in(now))
    closes = window.closes_after(opens)
    assert closes is not None
    assert window.night_of(opens) == window.night_of(closes - timedelta(microseconds=1))
    # Also while it is shut, so that what is told when it has closed belongs to the night before.
    assert window.night_of(closes) == window.night_of(opens) or window.is_open(closes)


@pytest.mark.parametrize(
    ("now", "seconds"),
    [
        ("2026-11-25 21:59:59", 1.0),
        ("2026-11-25 22:00:00", 0.0),
        ("2026-11-26 05:59:59", 0.0),
        ("2026-11-26 06:00:00", 16 * 3600.0),
    ],
)
def test_a_window_may_lie_over_midnight(now: str, seconds: float) -> None:
    assert night("22:00", "06:00").opens_in(berlin(now)) == seconds


def test_the_night_that_loses_an_hour_is_an_hour_shorter() -> None:
    window = night("01:00", "06:00")
    opens = berlin("2026-03-29 01:00")
    closes = window.closes_after(opens)
    assert closes is not None
    assert closes - opens.astimezone(UTC) == timedelta(hours=4)


def test_the_night_that_gains_an_hour_is_an_hour_longer() -> None:
    window = night("01:00", "06:00")
    opens = berlin("2026-10-25 01:00")
    closes = window.closes_after(opens)
    assert closes is not None
    assert closes - opens.astimezone(UTC) == timedelta(hours=6)


def test_a_time_that_does_not_exist_is_the_end_of_the_jump() -> None:
    jump = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # 02:00 becomes 03:00
    assert not night("02:30", "06:00").is_open(jump - timedelta(seconds=1))
    assert night("02:30", "06:00").is_open(jump)
    assert night("01:00", "02:30").closes_after(jump - timedelta(hours=1)) == jump


def test_a_window_that_the_jump_swallows_opens_the_next_night() -> None:
    window = night("02:10", "02:50")
    assert window.opens_in(berlin("2026-03-29 01:59")) == pytest.approx(86400 + 11 * 60 - 3600)


def test_a_time_that_comes_twice_is_its_first_passing() -> None:
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # 02:30 summer time
    assert night("02:30", "06:00").is_open(first)
    assert night("01:00", "02:30").closes_after(first - timedelta(minutes=1)) == first
    assert not night("01:00", "02:30").is_open(first + timedelta(hours=1))


def test_a_night_is_named_by_the_day_on_which_it_opened() -> None:
    window = night("22:00", "06:00")
    assert window.night_of(berlin("2026-11-26 05:00")) == date(2026, 11, 25)
    assert window.night_of(berlin("2026-11-26 06:00")) == date(2026, 11, 25)
    assert window.night_of(berlin("2026-11-26 22:00")) == date(2026, 11, 26)


@pytest.mark.parametrize(("name", "near"), [
    ("Europe/Berln", "Europe/Berlin"), ("berlin", "Europe/Berlin"), ("Europe/New_York", "America/New_York"),
    ("utc", "UTC"), ("Narnia/Aslan", "IANA"), ("", "IANA"), ("../etc/passwd", "IANA"),
])  # fmt: skip
def test_a_time_zone_that_does_not_exist_is_refused_with_what_is_near(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        time_zone(name)
    with pytest.raises(ValidationError, match=near):
        Window(start="01:00", end="02:00", time_zone=name)


@pytest.mark.parametrize("clock", ["24:00", "1:00", "01:60", "0100", "", "01:00:00"])
def test_a_time_of_day_is_written_as_hours_and_minutes(clock: str) -> None:
    with pytest.raises(ValidationError, match="HH:MM"):
        Window(start=clock, end="02:00")
