"""How many workers a load needs, how long it takes and what it costs: arithmetic from measured seconds per task.

Numbers are fractions, so that a load that fits exactly does not need one worker more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor

from inferq.schemas import InvalidTask

_HOUR, _DAY, _MONTH_DAYS = 3600, 86400, 30
_UNITS = {"s": 1, "min": 60, "m": 60, "h": _HOUR, "d": _DAY}
_MOST = Fraction(10**15)
"""Above this a number is a mistake, and would make a page of digits."""


@dataclass(frozen=True)
class Measured:
    """Slot seconds per task by activity, and where they were measured."""

    parts: Mapping[str, Fraction]
    source: str

    @property
    def seconds(self) -> Fraction:
        return sum(self.parts.values(), Fraction())


@dataclass(frozen=True)
class Step:
    """One line of the arithmetic: a value, and how it comes about."""

    name: str
    value: str
    how: str


@dataclass(frozen=True)
class Plan:
    """What a load needs. Of a batch, `seconds` is its duration; of a rate it is a day."""

    workers: int
    seconds: Fraction
    gpu_hours: Fraction
    cost: Fraction | None
    cost_per_1000: Fraction | None
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Capacity:
    """What one worker with one GPU can do. `reserve` is the share of its time that it keeps free, below 1.

    `slots`: how many tasks it runs at a time, each for `measured.seconds`. `price`: money for a GPU hour.
    """

    measured: Measured
    slots: int = 1
    reserve: Fraction = Fraction()
    price: Fraction | None = None

    def __post_init__(self) -> None:
        _require(0 < self.measured.seconds <= _MOST, "the seconds per task must be above 0")
        _require(0 <= self.reserve < 1, "--reserve must be from 0 to below 100%")
        _require(1 <= self.slots <= 64, "--slots must be from 1 to 64")
        _require(self.price is None or 0 <= self.price <= _MOST, "--price must not be negative")

    def for_rate(self, rate: Fraction) -> Plan:
        """The plan for a lasting rate of tasks per second. Raises InvalidTask."""
        _require(0 < rate <= _MOST, "--rate must be above 0")
        seconds, usable = self.measured.seconds, 1 - self.reserve
        busy = rate * seconds
        workers = ceil(busy / (self.slots * usable))
        steps = [
            *self._given(),
            Step("rate", f"{_text(rate)}/s", f"{_text(rate * _DAY)} tasks per day"),
            Step("slots computing", _text(busy), f"{_text(rate)}/s × {_text(seconds)} s"),
            Step("workers", f"{workers:,}", f"{_text(busy)} / {self._share()}, rounded up"),
            Step("load", _percent(busy / (workers * self.slots)), "of the time of all slots"),
        ]
        return self._priced(workers, Fraction(_DAY), rate * _DAY, steps, "per day")

    def for_batch(self, tasks: int, *, within: Fraction | None = None, workers: int | None = None) -> Plan:
        """The plan for a batch that has to end `within` seconds, or for a given number of workers.

        Raises InvalidTask, also if one task alone takes longer.
        """
        _require(1 <= tasks <= _MOST, "--tasks must be at least 1")
        seconds, usable = self.measured.seconds, 1 - self.reserve
        steps = [*self._given(), Step("tasks", f"{tasks:,}", "")]
        if within is not None:
            _require(0 < within <= _MOST, "--within must be above 0")
            each = floor(within * usable / seconds)
            _require(
                each > 0,
                f"one task takes {_text(seconds / usable)} s with the reserve, longer than the {_span(within)} for "
                "all of them: give them more time",
            )
            workers = ceil(Fraction(tasks, each * self.slots))
            steps += [
                Step(
                    "tasks of a slot", f"{each:,}",
                    f"{_text(within)} s × {_text(usable)} / {_text(seconds)} s, rounded down",
                ),
                Step("workers", f"{workers:,}", f"{tasks:,} / ({each:,} × {_count(self.slots, 'slot')}), rounded up"),
            ]  # fmt: skip
        else:
            workers = workers or 0
            _require(1 <= workers <= _MOST, "--workers must be at least 1")
            steps.append(Step("workers", f"{workers:,}", ""))
        rounds = ceil(Fraction(tasks, workers * self.slots))
        lasts = rounds * seconds / usable
        steps.append(
            Step(
                "duration", _span(lasts), f"{rounds:,} tasks of a slot × {_text(seconds)} s / {_text(usable)}"
            )
        )
        return self._priced(workers, lasts, Fraction(tasks), steps, "")

    def _given(self) -> Iterable[Step]:
        parts = " + ".join(f"{name} {_text(part)}" for name, part in self.measured.parts.items())
        how = f"{parts}; {self.measured.source}" if len(self.measured.parts) > 1 else self.measured.source
        yield Step("seconds per task", f"{_text(self.measured.seconds)} s", how)
        yield Step(
            "reserve", _percent(self.reserve), f"{_text(1 - self.reserve)} of each slot's time is used"
        )

    def _share(self) -> str:
        return f"({_count(self.slots, 'slot')} × {_text(1 - self.reserve)})"

    def _priced(self, workers: int, seconds: Fraction, tasks: Fraction, steps: list[Step], per: str) -> Plan:
        hours = workers * seconds / _HOUR
        how = f"{_count(workers, 'worker')} × {_text(seconds / _HOUR)} h, one GPU each"
        steps.append(Step(f"GPU hours {per}".strip(), _text(hours), how))
        plan = Plan(workers, seconds, hours, None, None, tuple(steps))
        if self.price is None:
            return plan
        cost = hours * self.price
        each = cost / tasks * 1000
        steps.append(Step(f"cost {per}".strip(), _money(cost), f"{_text(hours)} h × {_money(self.price)}"))
        if per:
            steps.append(
                Step("cost of 30 days", _money(cost * _MONTH_DAYS), f"{_MONTH_DAYS} × {_money(cost)}")
            )
        steps.append(Step("cost of 1,000 tasks", _money(each), f"{_money(cost)} / {_text(tasks)} × 1,000"))
        return replace(plan, cost=cost, cost_per_1000=each, steps=tuple(steps))


# Numbers as people write them.


def parse_number(option: str, text: str) -> Fraction:
    """A decimal number, such as `2.15`. Raises InvalidTask."""
    if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", text):
        raise InvalidTask(f"{option} {text!r} is not a number; write 2.15")
    return Fraction(text)


def parse_share(option: str, text: str) -> Fraction:
    """A share, `20%` or `0.2`. Raises InvalidTask."""
    number = parse_number(option, text.removesuffix("%"))
    share = number / 100 if text.endswith("%") else number
    _require(0 <= share < 1, f"{option} {text!r} is not a share below 1; write 20% or 0.2")
    return share


def parse_rate(option: str, text: str) -> Fraction:
    """Tasks per second, from `5/s`, `300/min`, `1000/h` or `20000/d`. Raises InvalidTask."""
    number, slash, unit = text.partition("/")
    if not slash or unit not in _UNITS:
        raise InvalidTask(f"{option} {text!r} is not a rate; write 5/s, 300/min, 1000/h or 20000/d")
    return parse_number(option, number) / _UNITS[unit]


def parse_span(option: str, text: str) -> Fraction:
    """Seconds, from `90s`, `30m`, `8h` or `1d`. Raises InvalidTask."""
    found = re.fullmatch(r"([0-9.]+)([a-z]+)", text)
    if found is None or found[2] not in _UNITS:
        raise InvalidTask(f"{option} {text!r} is not a span of time; write 90s, 30m, 8h or 1d")
    return parse_number(option, found[1]) * _UNITS[found[2]]


def _require(met: bool, message: str) -> None:
    if not met:
        raise InvalidTask(message)


def _text(number: Fraction) -> str:
    """A number for a line of the arithmetic: whole, or with four digits that count."""
    if number.denominator == 1:
        return f"{number.numerator:,}"
    return f"{float(number):,.2f}" if abs(number) >= 100 else f"{float(number):.4g}"


def _money(number: Fraction) -> str:
    return f"{float(number):,.2f}" if number >= 1 or number == 0 else f"{float(number):.3g}"


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):.4g}%"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _span(seconds: Fraction) -> str:
    for unit, length in (("h", _HOUR), ("min", 60)):
        if seconds >= length:
            return f"{_text(seconds / length)} {unit}"
    return f"{_text(seconds)} s"
