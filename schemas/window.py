"""The hours in which a batch is fed, and their time zones."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from difflib import get_close_matches
from functools import cache
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_CLOCK = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")
_NEAR = 3


def time_zone(name: str) -> ZoneInfo:
    """The time zone of an IANA name. Raises ValueError, with similar names, if there is none."""
    try:
        # An unknown name could still be a folder or a file beside the database.
        if name in _names():
            return ZoneInfo(name)
    except (OSError, ValueError, ZoneInfoNotFoundError):
        pass
    raise ValueError(f"there is no time zone {name!r}; {_near(name)}")


@cache
def _names() -> frozenset[str]:
    return frozenset(available_timezones())  # read from many files


def _near(name: str) -> str:
    """Similar names: by the whole name, or by its part after the continent."""
    known = {zone.lower(): zone for zone in sorted(_names())}
    cities: dict[str, str] = {}
    for zone in known.values():
        cities.setdefault(zone.rpartition("/")[2].lower(), zone)
    wanted = name.strip().lower().replace(" ", "_")
    near = [known[key] for key in get_close_matches(wanted, known, n=_NEAR, cutoff=0.7)]
    city = wanted.rpartition("/")[2]
    near += [cities[key] for key in get_close_matches(city, cities, n=_NEAR, cutoff=0.8)]
    chosen = list(dict.fromkeys(near))[:_NEAR]
    if not chosen:
        return "give an IANA name such as Europe/Berlin"
    return f"near it are {', '.join(chosen)}"


def _is_time_zone(name: str) -> str:
    time_zone(name)
    return name


def _is_clock(value: str) -> str:
    if not _CLOCK.fullmatch(value):
        raise ValueError("write the time of day as HH:MM, from 00:00 to 23:59")
    return value


TimeZoneName = Annotated[str, AfterValidator(_is_time_zone)]
TimeOfDay = Annotated[
    str, AfterValidator(_is_clock), Field(json_schema_extra={"pattern": f"^{_CLOCK.pattern}$"})
]


class Window(BaseModel):
    """The hours of a day in which a batch is fed. It may cross midnight. Equal times mean the whole day.

    In an hour that daylight saving repeats, a time means its first passing. In a skipped hour it means the
    moment of the jump.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: TimeOfDay = Field(description="When it opens, as `22:00`.")
    end: TimeOfDay = Field(description="When it closes, as `06:00`.")
    time_zone: TimeZoneName = Field("UTC", description="An IANA name, as `Europe/Berlin`.")

    def is_open(self, now: datetime) -> bool:
        """Whether a batch may be fed at `now` (aware)."""
        return self.opens_in(now) == 0.0

    def opens_in(self, now: datetime) -> float:
        """Seconds from `now` (aware) until the window opens; 0 while it is open."""
        if self.start == self.end:
            return 0.0
        starts = []
        for opens, closes in self._around(now):
            if opens <= now < closes:
                return 0.0
            if opens > now:
                starts.append((opens - now).total_seconds())
        return min(starts)

    def closes_after(self, moment: datetime) -> datetime | None:
        """When the window next closes after `moment` (aware), in UTC; None if it never closes."""
        if self.start == self.end:
            return None
        return min(closes for _, closes in self._around(moment) if closes > moment)

    def opened_at(self, moment: datetime) -> datetime | None:
        """When the window last opened, up to `moment` (aware), in UTC. None if it never closes."""
        if self.start == self.end:
            return None
        return max(opens for opens, _ in self._around(moment) if opens <= moment)

    def night_of(self, moment: datetime) -> date:
        """The day on which the window last opened, up to `moment` (aware)."""
        opened = self.opened_at(moment) or moment
        return opened.astimezone(ZoneInfo(self.time_zone)).date()

    def _around(self, now: datetime) -> list[tuple[datetime, datetime]]:
        """The openings of the days about `now`, and when each ends; some days have none.

        Where daylight saving leaves a whole window out, it opens and closes in the same moment: it is none.
        """
        zone = ZoneInfo(self.time_zone)
        today = now.astimezone(zone).date()
        found = []
        for days in (-3, -2, -1, 0, 1, 2, 3):
            day = today + timedelta(days=days)
            last = day + timedelta(days=1) if self.end <= self.start else day
            opens, closes = (
                moment_of(datetime.combine(on, time.fromisoformat(clock)), zone)
                for on, clock in ((day, self.start), (last, self.end))
            )
            if opens < closes:
                found.append((opens, closes))
        return found


def moment_of(local: datetime, zone: ZoneInfo) -> datetime:
    """The moment of a local time (naive), in UTC; one that the clock jumps over is the end of the jump."""
    moment = local.replace(tzinfo=zone).astimezone(UTC)
    if moment.astimezone(zone).replace(tzinfo=None) == local:
        return moment
    # With the offset from before the jump the time lies behind it, with the one from after it before it.
    low, high = local.replace(tzinfo=zone, fold=1).astimezone(UTC), moment
    before = low.astimezone(zone).utcoffset()
    while high - low > timedelta(seconds=1):
        middle = low + (high - low) // 2
        low, high = (middle, high) if middle.astimezone(zone).utcoffset() == before else (low, middle)
    return high.replace(microsecond=0)  # clocks jump at whole seconds, and this is less than one behind it
