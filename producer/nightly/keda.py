"""Cron triggers for KEDA that start workers before a nightly run is fed.

https://keda.sh/docs/latest/scalers/cron/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime

from cronsim import CronSim

from inferq.schemas import InvalidTask, Window
from inferq.schemas.schedule import Schedule

FORMULA = "max(total / 4, total - waiting)"
"""The formula of k8s/components/keda."""
MOST_TIMES = 12
"""The most times a day for which a schedule gets triggers: a trigger has one time of the day."""

_SOME_TIME = datetime(2024, 1, 1, tzinfo=UTC)
_DAY = 24 * 60
_ALL_DAYS, _ALL_MONTHS, _ALL_WEEKDAYS = frozenset(range(1, 32)), frozenset(range(1, 13)), frozenset(range(7))


class NotExpressible(InvalidTask):
    """KEDA's cron has no equivalent of the schedule's; the message says why."""


@dataclass(frozen=True)
class CronTrigger:
    """A trigger that asks for workers from each time of `start` to the next time of `end`, both cron expressions."""

    name: str
    time_zone: str
    start: str
    end: str

    def yaml(self, replicas: int) -> str:
        """The trigger as one flow mapping."""
        metadata = {
            "timezone": self.time_zone, "start": self.start, "end": self.end, "desiredReplicas": str(replicas),
        }  # fmt: skip
        values = ", ".join(f"{name}: {json.dumps(value)}" for name, value in metadata.items())
        return f"{{type: cron, name: {self.name}, metadata: {{{values}}}}}"


@dataclass(frozen=True)
class _Days:
    """The days on which a cron expression fires; each set holds the numbers of its field."""

    days: Set[int]
    months: Set[int]
    weekdays: Set[int]

    def shifted(self, by: int) -> str | None:
        """The last three fields for the days `by` days later; None if no expression has them."""
        if by and (self.days, self.months) != (_ALL_DAYS, _ALL_MONTHS):
            return None
        weekdays = {(day + by) % 7 for day in self.weekdays}
        return " ".join(
            (_field(self.days, _ALL_DAYS), _field(self.months, _ALL_MONTHS), _field(weekdays, _ALL_WEEKDAYS))
        )


def triggers_of(schedule: Schedule, *, lead: int, hold: int) -> list[CronTrigger]:
    """The triggers of one schedule, from `lead` minutes before its runs are fed until `hold` minutes after.

    A run outside its window is fed once the window opens. Where the lead would reach into the day before and cron
    cannot say so, as for a day of the month, it begins at midnight; the end of the hold likewise. Raises
    NotExpressible.
    """
    cron = CronSim(schedule.cron, _SOME_TIME)
    days = _days_of(schedule, cron)
    if len(cron.minutes) * len(cron.hours) > MOST_TIMES:
        raise NotExpressible(
            f"{schedule.name}: {schedule.cron!r} has over {MOST_TIMES} times a day; set minReplicaCount instead"
        )
    times = (60 * hour + minute for hour in cron.hours for minute in cron.minutes)
    begins = sorted({_fed_from(time, schedule.feeding_window) for time in times})
    base = "night_" + re.sub(r"\W", "_", schedule.name, flags=re.ASCII)
    return [
        CronTrigger(
            base if number == 1 else f"{base}_{number}",
            schedule.time_zone,
            _expression(begin - lead, begin, days, schedule),
            _expression(begin + hold, begin, days, schedule),
        )
        for number, begin in enumerate(begins, 1)
    ]


def patch_of(
    schedules: Sequence[Schedule], *, replicas: int, lead: int, hold: int, formula: str = FORMULA
) -> tuple[str, list[str]]:
    """A JSON patch (RFC 6902, as YAML) of the ScaledObject of one type, and why schedules have no part in it."""
    lines, names, left_out = [], list[str](), []
    for schedule in schedules:
        try:
            triggers = triggers_of(schedule, lead=lead, hold=hold)
        except NotExpressible as error:
            left_out.append(error.message)
            continue
        for trigger in _with_own_names(triggers, names):
            names.append(trigger.name)
            lines += ["- op: add", "  path: /spec/triggers/-", f"  value: {trigger.yaml(replicas)}"]
    if names:
        value = json.dumps(f"max({', '.join((formula, *names))})")
        lines += ["- op: replace", "  path: /spec/advanced/scalingModifiers/formula", f"  value: {value}"]
    return "".join(f"{line}\n" for line in lines), left_out


def _with_own_names(triggers: Iterable[CronTrigger], taken: Sequence[str]) -> Iterator[CronTrigger]:
    """The triggers, renamed where another schedule has the name: `a-b` and `a_b` are the same in a formula."""
    for trigger in triggers:
        name = trigger.name
        while name in taken:
            name += "_"
        yield CronTrigger(name, trigger.time_zone, trigger.start, trigger.end)


def _days_of(schedule: Schedule, cron: CronSim) -> _Days:
    weekdays = {day % 7 if isinstance(day, int) else -1 for day in cron.weekdays}
    if min(cron.days) < 1 or min(weekdays) < 0:
        raise NotExpressible(f"{schedule.name}: KEDA's cron has no `L`, `W` and `#`, as in {schedule.cron!r}")
    every_day = cron.days == _ALL_DAYS, weekdays == _ALL_WEEKDAYS
    if any(every_day) and not cron.day_and:  # `1-31` or `0-6`: either field is enough
        return _Days(_ALL_DAYS, cron.months, _ALL_WEEKDAYS)
    if not any(every_day) and cron.day_and:
        raise NotExpressible(
            f"{schedule.name}: KEDA's cron cannot ask for both the day of the month and the day of the week, as "
            f"{schedule.cron!r} does"
        )
    return _Days(cron.days, cron.months, weekdays)


def _fed_from(time: int, window: Window | None) -> int:
    """When a run of that time of the day is fed, in minutes of that day; from 1440 on it is the next day."""
    if window is None:
        return time
    opens, closes = (60 * int(text[:2]) + int(text[3:]) for text in (window.start, window.end))
    inside = opens <= time < closes if opens < closes else time >= opens or time < closes
    if inside or opens == closes:
        return time
    return opens if opens > time else opens + _DAY


def _expression(moment: int, begin: int, days: _Days, schedule: Schedule) -> str:
    """The cron expression for `moment`, in minutes of the day of the run; at most at the edge of the day of `begin`."""
    shift, time = divmod(moment, _DAY)
    rest = days.shifted(shift)
    if rest is None:
        day = begin // _DAY
        rest, time = days.shifted(day), 0 if moment < begin else _DAY - 1
        if rest is None:
            raise NotExpressible(f"{schedule.name}: its window opens on the day after {schedule.cron!r}")
    return f"{time % 60} {time // 60} {rest}"


def _field(numbers: Set[int], every: Set[int]) -> str:
    return "*" if numbers == every else ",".join(map(str, sorted(numbers)))
