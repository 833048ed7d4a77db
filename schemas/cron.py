"""When a schedule is due: cron's five fields in a time zone, by the rules of Debian's cron.

Where daylight saving leaves an hour out, a job at a fixed time within it runs right after the jump, once.
Where an hour comes twice, such a job runs in its first passing. A job with `*` for its minute or hour goes by
the time that passes: it runs in both, and not in the hour that is left out.
https://manpages.debian.org/stable/cron/cron.8.en.html#NOTES
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from inferq.schemas import time_zone

_FIELDS = 5
_SOME_TIME = datetime(2024, 1, 1, tzinfo=UTC)
_FIRST_LOOK = timedelta(hours=2)


@dataclass(frozen=True)
class Cron:
    """A cron expression in the time zone of an IANA name. Times go in aware and come out in UTC.

    Raises ValueError for what is neither, and for what never fires.
    """

    expression: str
    zone: str = "UTC"

    def __post_init__(self) -> None:
        fields = self.expression.split()
        if len(fields) != _FIELDS:
            raise ValueError(
                f"{self.expression!r} has {len(fields)} fields, cron has {_FIELDS}: minute, hour, day of the "
                "month, month, day of the week"
            )
        _ = self._zone
        try:
            CronSim(self.expression, _SOME_TIME)
        except CronSimError as error:
            # The library finds some dates that never come while it reads, and calls the day a bad one.
            if _is_expression(" ".join([*fields[:3], "*", fields[4]])) and _is_expression(
                " ".join([*fields[:2], "*", *fields[3:]])
            ):
                raise self._never() from error
            raise ValueError(f"{self.expression!r} is no cron expression: {error}".lower()) from error
        if next(self.after(_SOME_TIME), None) is None:
            raise self._never()

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The times behind `moment`, each once, in order.

        Where the clock moves by half an hour (Lord Howe Island), a fixed minute of every hour may be left out
        in the hour of the change, in spring and in autumn.
        """
        last = moment.astimezone(UTC)
        for local in CronSim(self.expression, moment.astimezone(self._zone)):
            due = local.astimezone(UTC)
            # Begun in an hour's second passing, the library gives times of the first; and two times within an
            # hour that is left out become one.
            if due > last:
                last = due
                yield due

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """The last time behind `after` and not behind `until`; None where there is none."""
        look = _FIRST_LOOK
        while after < until:
            begin = max(after, until - look)
            found = None
            for due in self.after(begin):
                if due > until:
                    break
                found = due
            if found is not None or begin == after:
                return found
            look *= 8
        return None

    @cached_property
    def _zone(self) -> ZoneInfo:
        return time_zone(self.zone)

    def _never(self) -> ValueError:
        return ValueError(f"{self.expression!r} never fires: no month of its has such a day")


def _is_expression(expression: str) -> bool:
    try:
        CronSim(expression, _SOME_TIME)
    except CronSimError:
        return False
    return True
