"""The times of a schedule: cron's five fields in a time zone, by the rules of Debian's cron.

If daylight saving skips an hour, a job at a fixed time in that hour runs once, right after the jump. If an
hour comes twice, such a job runs in the first one. A job with `*` for its minute or hour follows elapsed time:
it runs in both hours, and not in the skipped one.
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
    """A cron expression in an IANA time zone. Arguments are aware times; answers are in UTC.

    Raises ValueError for a bad expression or zone, and for an expression that never fires.
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
            # The library finds some impossible dates while it parses, and reports the day as bad.
            if _is_expression(" ".join([*fields[:3], "*", fields[4]])) and _is_expression(
                " ".join([*fields[:2], "*", *fields[3:]])
            ):
                raise self._never() from error
            raise ValueError(f"{self.expression!r} is no cron expression: {error}".lower()) from error
        if next(self.after(_SOME_TIME), None) is None:
            raise self._never()

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The times after `moment`, each once, in order.

        If the clock moves by half an hour (Lord Howe Island), a fixed minute of every hour may be missing in
        the hour of the change.
        """
        last = moment.astimezone(UTC)
        for local in CronSim(self.expression, moment.astimezone(self._zone)):
            due = local.astimezone(UTC)
            # If `moment` lies in a repeated hour's second passing, the library gives times of the first. Two
            # times in a skipped hour become one.
            if due > last:
                last = due
                yield due

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """The last time after `after`, up to `until`; None if there is none."""
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
