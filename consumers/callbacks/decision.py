"""What follows an attempt to deliver a callback: a pure function from what came of it to a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

from inferq.schemas import CallbackAttempt

MAX_RETRY_AFTER = 86400.0
"""Seconds that a receiver may ask us to stay away, at most; longer than that is taken for this."""

JITTER = 0.1
"""A pause is longer than the schedule says by up to this part of it, so that repeats do not come in waves."""

_GONE = 410


@dataclass(frozen=True)
class Delivered:
    """The receiver has it."""


@dataclass(frozen=True)
class Again:
    """Try again `seconds` from now."""

    seconds: float


@dataclass(frozen=True)
class GivenUp:
    """It is not tried again, because of `reason`."""

    reason: str


Decision = Delivered | Again | GivenUp


def after_attempt(
    attempts: Sequence[CallbackAttempt],
    schedule: Sequence[float],
    *,
    retry_after: float | None = None,
    chance: float = 0.0,
) -> Decision:
    """What to do after the last of these attempts.

    `schedule` has the seconds before each attempt, `retry_after` those that the receiver asked for, and
    `chance`, from 0 to 1, spreads the pause.
    """
    last = attempts[-1]
    if last.status is not None and 200 <= last.status < 300:
        return Delivered()
    if last.status == _GONE:
        return GivenUp("the receiver answered 410: it wants no more of them")
    if len(attempts) >= len(schedule):
        what = f"status {last.status}" if last.status is not None else last.error
        return GivenUp(f"{len(attempts)} attempts failed, the last with: {what}")
    pause = schedule[len(attempts)] * (1 + JITTER * chance)
    if retry_after is not None:
        # Asking for less than the schedule changes nothing, or a broken receiver would use it up.
        pause = max(pause, min(retry_after, MAX_RETRY_AFTER) * (1 + JITTER * chance))
    return Again(pause)


def retry_after_seconds(value: str, now: datetime) -> float | None:
    """The seconds that a `Retry-After` header asks for, as a number or an HTTP date (RFC 9110, 10.2.3)."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=now.tzinfo)
    return max(0.0, (moment - now).total_seconds())
